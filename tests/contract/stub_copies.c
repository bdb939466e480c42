/* A libcuda.so.1 whose copies end late, fail or are refused, as tests want: what tierd's pinned path asks of a driver.
 *
 * "Device memory" is host memory. A copy from or to registered memory is put in a queue, and made when somebody looks at an event
 * behind it; of other memory it is made at once, as drivers do with pageable memory. All streams are one queue. Refused like by a driver:
 * a thread without a current context, batches on the default stream or of memory that is not registered, unregistering
 * what is not registered. Prototypes come from the real cuda.h, so a wrong one does not compile. While the file that a variable
 * names is there:
 *   STUB_COPIES_LATE     no copy that is in the queue is made
 *   STUB_COPIES_FAIL     copies that are made fail: the event says so, and bytes are wrong
 *   STUB_COPIES_REFUSE   the last copy of a batch, and every single one, is refused
 *   STUB_PINS_REFUSED    no memory can be registered
 * STUB_COPIES_EAGER: all copies are made at once, for pages whose kernels are twins, which are on no stream.
 * STUB_COPIES_BATCH=0: the driver knows no batches. stub_batches and stub_singles count the calls that were taken.
 */

#include <cuda.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { COPIES_MAX = 1 << 16, RANGES_MAX = 256, CONTEXT = 0x1000 };

struct copy { char *target; const char *source; size_t size; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct copy queue[COPIES_MAX];
static size_t given, made, failed_until;
static struct { char *start; size_t size; } registered[RANGES_MAX];
static __thread int depth;
int stub_batches, stub_singles;

static int there(const char *name) {
    const char *path = getenv(name);
    return path && *path && !access(path, F_OK);
}

static int is_registered(const char *start, size_t size) {
    for (int at = 0; at < RANGES_MAX; at++)
        if (registered[at].size && start >= registered[at].start && start + size <= registered[at].start + registered[at].size)
            return 1;
    return 0;
}

static void make(const struct copy *copy) {
    if (there("STUB_COPIES_FAIL")) memset(copy->target, 0xee, copy->size), failed_until = made + 1;
    else memcpy(copy->target, copy->source, copy->size);
}

static void pump(void) {
    if (there("STUB_COPIES_LATE")) return;
    for (; made < given; made++) make(&queue[made % COPIES_MAX]);
}

static CUresult give(void *target, const void *source, size_t size, const void *host) {
    struct copy copy = {target, source, size};
    if (given - made == COPIES_MAX) return CUDA_ERROR_OUT_OF_MEMORY;
    if (!is_registered(host, size) || getenv("STUB_COPIES_EAGER")) make(&copy);
    else queue[given++ % COPIES_MAX] = copy;
    return CUDA_SUCCESS;
}

static CUresult single(void *target, const void *source, size_t size, const void *host) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    if (there("STUB_COPIES_REFUSE")) return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    CUresult result = give(target, source, size, host);
    stub_singles++;
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == CUDA_ERROR_LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_OF_THE_STUB";
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(size_t)CONTEXT;
    return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (context != (CUcontext)(size_t)CONTEXT) return CUDA_ERROR_INVALID_CONTEXT;
    depth++;
    return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    (void)context;
    return depth && depth-- ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuMemHostRegister_v2(void *start, size_t size, unsigned int flags) {
    CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    if (!size || flags != CU_MEMHOSTREGISTER_PORTABLE) return CUDA_ERROR_INVALID_VALUE;
    if (there("STUB_PINS_REFUSED")) return result;
    pthread_mutex_lock(&lock);
    for (int at = 0; at < RANGES_MAX && result; at++)
        if (!registered[at].size) registered[at].start = start, registered[at].size = size, result = CUDA_SUCCESS;
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuMemHostUnregister(void *start) {
    CUresult result = CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    pthread_mutex_lock(&lock);
    for (int at = 0; at < RANGES_MAX; at++)
        if (registered[at].size && registered[at].start == start) registered[at].size = 0, result = CUDA_SUCCESS;
    pthread_mutex_unlock(&lock);
    return depth ? result : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t size, CUstream stream) {
    (void)stream;
    return single((void *)target, source, size, source);
}

CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t size, CUstream stream) {
    (void)stream;
    return single(target, (void *)source, size, target);
}

CUresult cuMemcpyBatchAsync(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count, CUmemcpyAttributes *attributes,
                            size_t *firsts, size_t attribute_count, size_t *failed, CUstream stream) {
    const char *batch = getenv("STUB_COPIES_BATCH");
    if (batch && *batch == '0') return CUDA_ERROR_NOT_SUPPORTED;
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    if (!stream || !count || attribute_count != 1 || firsts[0] || attributes[0].srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&lock);
    for (size_t at = 0; at < count && !result; at++) {
        char *target = (char *)targets[at], *source = (char *)sources[at];
        int near = is_registered(target, sizes[at]);
        int right = (near || is_registered(source, sizes[at])) && !(at + 1 == count && there("STUB_COPIES_REFUSE"));
        *failed = at;
        result = right ? give(target, source, sizes[at], near ? target : source) : CUDA_ERROR_INVALID_VALUE;
    }
    if (!result) stub_batches++;
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuStreamSynchronize(CUstream stream) {
    (void)stream;
    return depth ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    *event = calloc(1, sizeof(size_t));
    return depth && flags == CU_EVENT_DISABLE_TIMING ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    (void)stream;
    pthread_mutex_lock(&lock);
    *(size_t *)event = given;
    pthread_mutex_unlock(&lock);
    return depth ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuEventQuery(CUevent event) {
    CUresult result = CUDA_ERROR_NOT_READY;
    pthread_mutex_lock(&lock);
    pump();
    if (made >= *(size_t *)event) result = failed_until ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
    if (result == CUDA_ERROR_LAUNCH_FAILED) failed_until = 0;
    pthread_mutex_unlock(&lock);
    return depth ? result : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuEventDestroy_v2(CUevent event) {
    free(event);
    return CUDA_SUCCESS;
}
