/* A libcuda.so.1 that emulates a device in host memory: enough of the driver to run tierd's gpu tier on a machine without one.
 *
 * "Device memory" is a memfd, an exported handle a descriptor of it, and mapping it is mmap. So device addresses can be read and
 * written by the CPU too, which tests use; the library itself refuses what a driver would refuse: sizes that are no multiples
 * of the granularity, mappings beyond an allocation, copies of memory that is not mapped or not made accessible, a thread without a
 * current context, descriptors that are no exported memory. What it cannot show: whether a real driver takes the same calls, in
 * what order copies become visible, and what becomes of memory whose exporter is killed (here it lives as long as a descriptor).
 *
 * Prototypes come from the real cuda.h, so a wrong one does not compile. Settings, by environment variables:
 *   STUB_CUDA_DEVICES (1), STUB_CUDA_GRANULARITY (2 MiB), STUB_CUDA_BYTES (1 GiB: what the device says it has),
 *   STUB_CUDA_ALLOCATION_BYTES_MAX (1 GiB: what can be had at once), STUB_CUDA_LACKS (numbers of device
 *   attributes that are 0, such as "103"), STUB_CUDA_IMPORT_FAILS (a path: while a file is there, no descriptor can be imported),
 *   STUB_CUDA_PINS_REFUSED (no host memory can be registered). Kernels are executed by ptx.c.
 */

#define _GNU_SOURCE
#include <cuda.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DEVICES_MAX = 8, RANGES_MAX = 4096 };

struct range { char *start; size_t size; int readable, device; };  /* of mappings; of reservations without the last */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialized;
static struct range reserved[RANGES_MAX], mapped[RANGES_MAX];
static __thread CUcontext contexts[16];
static __thread int depth;

static size_t setting(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

static size_t granularity(void) { return setting("STUB_CUDA_GRANULARITY", 2 << 20); }
static int devices(void) { return (int)setting("STUB_CUDA_DEVICES", 1); }
static CUcontext primary(CUdevice device) { return (CUcontext)(size_t)(0x1000 + device); }

/* -- initialisation, errors, devices ------------------------------------------------------------------------------- */

CUresult cuInit(unsigned int flags) { initialized = 1; return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }

CUresult cuGetErrorName(CUresult error, const char **name) {
    switch (error) {
        case CUDA_ERROR_ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        case CUDA_ERROR_UNSUPPORTED_PTX_VERSION: *name = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"; break;
        case CUDA_ERROR_INVALID_PTX: *name = "CUDA_ERROR_INVALID_PTX"; break;
        case CUDA_ERROR_INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case CUDA_ERROR_OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case CUDA_ERROR_NOT_INITIALIZED: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
        case CUDA_ERROR_INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case CUDA_ERROR_INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case CUDA_ERROR_NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
        case CUDA_ERROR_INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
        default: *name = "CUDA_ERROR_UNKNOWN";
    }
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) { return cuGetErrorName(error, text); }

static CUresult known(CUdevice device) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    return device >= 0 && device < devices() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetCount(int *count) { *count = devices(); return initialized ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return known(ordinal); }

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, "Emulated Device %d", device);
    return known(device);
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    memset(uuid->bytes, 0x10 + device, sizeof uuid->bytes);
    return known(device);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) { *bytes = setting("STUB_CUDA_BYTES", 1 << 30); return known(device); }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    char wanted[16], lacking[256];
    snprintf(wanted, sizeof wanted, ",%d,", (int)attribute);
    snprintf(lacking, sizeof lacking, ",%s,", getenv("STUB_CUDA_LACKS") ? getenv("STUB_CUDA_LACKS") : "");
    *value = strstr(lacking, wanted) ? 0 : 1;
    return known(device);
}

/* -- contexts ------------------------------------------------------------------------------------------------------ */

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = primary(device); return known(device); }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return known(device); }

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (depth == 16) return CUDA_ERROR_INVALID_CONTEXT;
    contexts[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    depth--;
    if (context) *context = contexts[depth];
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { *context = depth ? contexts[depth - 1] : NULL; return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    *device = (int)(size_t)contexts[depth - 1] - 0x1000;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) { return depth ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT; }

/* -- memory: allocations are memfds, handles are descriptors ------------------------------------------------------- */

static int device_of(int descriptor) {  /* whose memory it is; -1: nobody's */
    char link[64], target[128] = "";
    int device = -1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    if (readlink(link, target, sizeof target - 1) > 0) sscanf(target, "/memfd:device-%d", &device);
    return device;
}

static int is_device_memory(int descriptor) { return device_of(descriptor) >= 0; }

static struct range *covering(struct range *ranges, const char *start, size_t size) {
    for (struct range *range = ranges; range < ranges + RANGES_MAX; range++)
        if (range->size && start >= range->start && start + size <= range->start + range->size) return range;
    return NULL;
}

static int overlaps(struct range *ranges, const char *start, size_t size) {
    for (struct range *range = ranges; range < ranges + RANGES_MAX; range++)
        if (range->size && start < range->start + range->size && range->start < start + size) return 1;
    return 0;
}

static CUresult enter(struct range *ranges, char *start, size_t size) {
    for (struct range *range = ranges; range < ranges + RANGES_MAX; range++)
        if (!range->size) {
            *range = (struct range){start, size, 0};
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *prop, CUmemAllocationGranularity_flags option) {
    (void)option;
    *bytes = granularity();
    return prop->type == CU_MEM_ALLOCATION_TYPE_PINNED ? known(prop->location.id) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop, unsigned long long flags) {
    int right = prop->type == CU_MEM_ALLOCATION_TYPE_PINNED && prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE
        && prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR && !prop->win32HandleMetaData && !flags;
    if (known(prop->location.id)) return known(prop->location.id);
    if (!right || !size || size % granularity()) return CUDA_ERROR_INVALID_VALUE;
    int fits = size <= setting("STUB_CUDA_ALLOCATION_BYTES_MAX", 1 << 30);
    char name[32];
    snprintf(name, sizeof name, "device-%d", prop->location.id);
    int descriptor = fits ? memfd_create(name, MFD_CLOEXEC) : -1;
    if (descriptor < 0 || ftruncate(descriptor, size)) return CUDA_ERROR_OUT_OF_MEMORY;
    void *content = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (content == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    memset(content, 0xa5, size);  /* nobody says that new memory is zero */
    munmap(content, size);
    *handle = descriptor;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) { return close((int)handle) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult cuMemExportToShareableHandle(void *out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,
                                      unsigned long long flags) {
    int copy = type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR && !flags ? dup((int)handle) : -1;
    if (copy < 0) return CUDA_ERROR_INVALID_VALUE;
    *(int *)out = copy;
    return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *descriptor, CUmemAllocationHandleType type) {
    int given = (int)(size_t)descriptor;
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || !is_device_memory(given)) return CUDA_ERROR_INVALID_VALUE;
    if (getenv("STUB_CUDA_IMPORT_FAILS") && !access(getenv("STUB_CUDA_IMPORT_FAILS"), F_OK)) return CUDA_ERROR_NOT_SUPPORTED;
    *handle = dup(given);
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop, CUmemGenericAllocationHandle handle) {
    if (!is_device_memory((int)handle)) return CUDA_ERROR_INVALID_VALUE;
    *prop = (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                  .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                  .location = {CU_MEM_LOCATION_TYPE_DEVICE, device_of((int)handle)}};
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *out, size_t size, size_t alignment, CUdeviceptr fixed, unsigned long long flags) {
    size_t step = alignment > granularity() ? alignment : granularity();
    if (!size || size % granularity() || fixed || flags) return CUDA_ERROR_INVALID_VALUE;
    char *start = mmap(NULL, size + step, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char *aligned = (char *)(((size_t)start + step - 1) / step * step);
    if (aligned > start) munmap(start, aligned - start);
    if (aligned < start + step) munmap(aligned + size, start + step - aligned);
    pthread_mutex_lock(&lock);
    CUresult result = enter(reserved, aligned, size);
    pthread_mutex_unlock(&lock);
    *out = (CUdeviceptr)aligned;
    return result;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    pthread_mutex_lock(&lock);
    struct range *range = covering(reserved, (char *)address, size);
    int whole = range && range->start == (char *)address && range->size == size && !overlaps(mapped, (char *)address, size);
    if (whole) munmap(range->start, size), range->size = 0;
    pthread_mutex_unlock(&lock);
    return whole ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) {
    char *start = (char *)address;
    struct stat about;
    int right = size && !offset && !flags && !(address % granularity()) && !(size % granularity()) && is_device_memory((int)handle)
        && !fstat((int)handle, &about) && size <= (size_t)about.st_size;
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    if (right && covering(reserved, start, size) && !overlaps(mapped, start, size)
        && mmap(start, size, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle, 0) == start)
        result = enter(mapped, start, size);
    if (!result) covering(mapped, start, size)->device = device_of((int)handle);
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *access, size_t count) {
    pthread_mutex_lock(&lock);
    struct range *range = covering(mapped, (char *)address, size);
    int right = range && range->start == (char *)address && range->size == size && count == 1
        && access->location.type == CU_MEM_LOCATION_TYPE_DEVICE && !known(access->location.id)
        && access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE && !mprotect(range->start, size, PROT_READ | PROT_WRITE);
    if (right) range->readable = 1;
    pthread_mutex_unlock(&lock);
    return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    pthread_mutex_lock(&lock);
    struct range *range = covering(mapped, (char *)address, size);
    int whole = range && range->start == (char *)address && range->size == size;
    if (whole) {
        mmap(range->start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        range->size = 0;
    }
    pthread_mutex_unlock(&lock);
    return whole ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* -- what an address is -------------------------------------------------------------------------------------------- */

static struct range *device_range(CUdeviceptr address, size_t size) {
    pthread_mutex_lock(&lock);
    struct range *range = covering(mapped, (char *)address, size);
    pthread_mutex_unlock(&lock);
    return range && range->readable ? range : NULL;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *size, CUdeviceptr address) {
    struct range *range = device_range(address, 1);
    if (!range) return CUDA_ERROR_INVALID_VALUE;
    if (start) *start = (CUdeviceptr)range->start;
    if (size) *size = range->size;
    return CUDA_SUCCESS;
}

static CUresult attribute_of(void *data, CUpointer_attribute attribute, CUdeviceptr address, int strict) {
    struct range *device = device_range(address, 1);
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (strict && !device) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)data = NULL; break;  /* a mapping belongs to no context */
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(CUmemorytype *)data = device ? CU_MEMORYTYPE_DEVICE : 0; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)data = device ? address : 0; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)data = device ? device->device : -2; break;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
    return attribute_of(data, attribute, address, 1);
}

CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute *attributes, void **data, CUdeviceptr address) {
    for (unsigned int at = 0; at < count; at++) {
        CUresult result = attribute_of(data[at], attributes[at], address, 0);
        if (result) return result;
    }
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
    CUdevice device;
    if (cuCtxGetDevice(&device)) return CUDA_ERROR_INVALID_CONTEXT;
    char *start = size ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
    if (start == MAP_FAILED) return size ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE;
    memset(start, 0xa5, size);
    pthread_mutex_lock(&lock);
    CUresult result = enter(mapped, start, size);
    if (!result) *covering(mapped, start, size) = (struct range){start, size, 1, device};
    pthread_mutex_unlock(&lock);
    *out = (CUdeviceptr)start;
    return result;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    pthread_mutex_lock(&lock);
    struct range *range = covering(mapped, (char *)address, 1);
    int whole = range && range->start == (char *)address;
    if (whole) munmap(range->start, range->size), range->size = 0;
    pthread_mutex_unlock(&lock);
    return whole ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemsetD8_v2(CUdeviceptr target, unsigned char byte, size_t size) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    if (!device_range(target, size)) return CUDA_ERROR_INVALID_VALUE;
    memset((void *)target, byte, size);
    return CUDA_SUCCESS;
}

/* -- copies that have ended when they return ----------------------------------------------------------------------- */

static CUresult copy(void *target, const void *source, size_t size, CUdeviceptr device) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    if (!device_range(device, size)) return CUDA_ERROR_INVALID_VALUE;
    memcpy(target, source, size);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void *source, size_t size) { return copy((void *)target, source, size, target); }
CUresult cuMemcpyDtoH_v2(void *target, CUdeviceptr source, size_t size) { return copy(target, (void *)source, size, source); }

/* Here nothing is ever under way, and any host memory can be registered. Weak: a file that emulates streams may say otherwise. */
__attribute__((weak)) CUresult cuStreamSynchronize(CUstream stream) { (void)stream; return cuCtxSynchronize(); }

__attribute__((weak)) CUresult cuMemHostRegister_v2(void *start, size_t size, unsigned int flags) {
    if (getenv("STUB_CUDA_PINS_REFUSED")) return CUDA_ERROR_OUT_OF_MEMORY;
    return !depth ? CUDA_ERROR_INVALID_CONTEXT : start && size && flags == CU_MEMHOSTREGISTER_PORTABLE ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

__attribute__((weak)) CUresult cuMemHostUnregister(void *start) { return start ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
