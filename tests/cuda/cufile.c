/* A libcufile.so.0 that moves bytes between files and emulated device memory (see device.c), for kvikio's GPUDirect Storage path.
 *
 * A read or write is one pread or pwrite on the descriptor that kvikio has registered, and is counted in the statistics as the way that
 * STUB_CUFILE_WAY names: p2p (the default), nvfs or posix. STUB_CUFILE_MICROSECONDS makes each one slower. Nothing here says how
 * fast a real one is, or that a file system takes part.
 */

#define _GNU_SOURCE
#include <cufile.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const CUfileError_t success = {CU_FILE_SUCCESS, CUDA_SUCCESS};
static atomic_ulong reads, writes;

/* -- driver -------------------------------------------------------------------------------------------------------- */

static int is_open;

CUfileError_t cuFileDriverOpen(void) { is_open = 1; return success; }
#undef cuFileDriverClose
CUfileError_t cuFileDriverClose(void) { return success; }
CUfileError_t cuFileDriverClose_v2(void) { return success; }
CUfileError_t cuFileGetVersion(int *version) { *version = 1150; return success; }
CUfileError_t cuFileDriverGetProperties(CUfileDrvProps_t *props) { memset(props, 0, sizeof *props); return success; }

/* -- files and bytes ----------------------------------------------------------------------------------------------- */

CUfileError_t cuFileHandleRegister(CUfileHandle_t *handle, CUfileDescr_t *about) {
    *handle = (CUfileHandle_t)(size_t)(about->handle.fd + 1);
    return success;
}

void cuFileHandleDeregister(CUfileHandle_t handle) { (void)handle; }

static ssize_t moved(ssize_t bytes, atomic_ulong *counter) {
    const char *pause = getenv("STUB_CUFILE_MICROSECONDS");
    if (pause) usleep(atoi(pause));
    if (bytes >= 0) atomic_fetch_add(counter, 1);
    return bytes;
}

ssize_t cuFileRead(CUfileHandle_t handle, void *base, size_t size, off_t at, off_t offset) {
    return moved(pread((int)(size_t)handle - 1, (char *)base + offset, size, at), &reads);
}

ssize_t cuFileWrite(CUfileHandle_t handle, const void *base, size_t size, off_t at, off_t offset) {
    return moved(pwrite((int)(size_t)handle - 1, (const char *)base + offset, size, at), &writes);
}

/* -- statistics ---------------------------------------------------------------------------------------------------- */

static int level, started;

CUfileError_t cuFileSetStatsLevel(int wanted) { level = wanted; return success; }

CUfileError_t cuFileStatsStart(void) {
    if (!is_open) return (CUfileError_t){CU_FILE_DRIVER_NOT_INITIALIZED, CUDA_SUCCESS};
    started = 1;
    return success;
}

CUfileError_t cuFileGetStatsL3(CUfileStatsLevel3_t *stats) {
    const char *way = getenv("STUB_CUFILE_WAY") ? getenv("STUB_CUFILE_WAY") : "p2p";
    CUfilePerGpuStats_t *gpu = stats->per_gpu_stats;
    if (level < 3 || !started) return (CUfileError_t){CU_FILE_INVALID_VALUE, CUDA_SUCCESS};
    memset(stats, 0, sizeof *stats);
    stats->num_gpus = 1;
    *(!strcmp(way, "p2p") ? &gpu->n_p2p_reads : !strcmp(way, "nvfs") ? &gpu->n_nvfs_reads : &gpu->n_posix_reads) = reads;
    *(!strcmp(way, "p2p") ? &gpu->n_p2p_writes : !strcmp(way, "nvfs") ? &gpu->n_nvfs_writes : &gpu->n_posix_writes) = writes;
    return success;
}

/* -- what kvikio looks up and tierd does not use ------------------------------------------------------------------- */

/* by name alone: nobody calls them, so nobody minds their arguments */
#define UNUSED(name) __asm__(".globl " #name "\n.set " #name ", unused");
__attribute__((used)) static int unused(void) { return CU_FILE_INVALID_VALUE; }

UNUSED(cuFileBufRegister) UNUSED(cuFileBufDeregister) UNUSED(cuFileDriverSetPollMode) UNUSED(cuFileDriverSetMaxCacheSize)
UNUSED(cuFileDriverSetMaxPinnedMemSize) UNUSED(cuFileBatchIOSetUp) UNUSED(cuFileBatchIOSubmit) UNUSED(cuFileBatchIOGetStatus)
UNUSED(cuFileBatchIOCancel) UNUSED(cuFileBatchIODestroy) UNUSED(cuFileReadAsync) UNUSED(cuFileWriteAsync)
UNUSED(cuFileStreamRegister) UNUSED(cuFileStreamDeregister)
