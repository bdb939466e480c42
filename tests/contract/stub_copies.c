/* A libcuda.so.1 whose streams are behind, and whose copies fail or are refused, as tests want: what tierd's pinned path asks of a driver.
 *
 * "Device memory" is host memory. What a stream is given waits in its queue, and is done when somebody looks at an event behind it, no
 * further than up to that: so whoever does not wait for a stream sees memory as it was before. A copy from or to memory that is not
 * registered ends before the call returns, as with drivers, behind all that its stream had. A kernel is a host function. Refused like by a
 * driver: a thread without a current context, streams and events of another device's context, batches on the default stream or of
 * memory that is not registered, unregistering what is not registered. There are two devices; a stream's handle divided by 100 is the
 * number of its device. Prototypes come from the real cuda.h, so a wrong one does not compile. While the file that a variable names is there:
 *   STUB_COPIES_LATE     no stream goes on
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

enum { STREAMS_MAX = 16, QUEUE_MAX = 1 << 14, RANGES_MAX = 256, DEVICES = 2, CONTEXT = 0x1000, DEPTH_MAX = 16 };

struct work { char *target; const char *source; size_t size; CUhostFn kernel; void *argument; };
struct stream { CUstream handle; int device, failed; size_t given, made; struct work queue[QUEUE_MAX]; };
struct CUevent_st { int device; struct stream *stream; size_t position; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stream streams[STREAMS_MAX];
static int stream_count;
static struct { char *start; size_t size; } registered[RANGES_MAX];
static __thread int contexts[DEPTH_MAX], depth;
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

/* -- streams: all of this with the lock held ----------------------------------------------------------------------- */

static struct stream *stream_of(CUstream handle) {  /* NULL: it is not one of the current context's device */
    int device = depth ? contexts[depth - 1] : -1, at = 0;
    if (device < 0 || (handle && (int)((size_t)handle / 100) != device)) return NULL;
    while (at < stream_count && (streams[at].handle != handle || streams[at].device != device)) at++;
    if (at == STREAMS_MAX) return NULL;
    if (at == stream_count) streams[stream_count++].handle = handle, streams[at].device = device;
    return &streams[at];
}

static void go_on(struct stream *stream, size_t until) {
    for (; stream->made < until && !there("STUB_COPIES_LATE"); stream->made++) {
        struct work *work = &stream->queue[stream->made % QUEUE_MAX];
        if (work->kernel) work->kernel(work->argument);
        else if (there("STUB_COPIES_FAIL")) memset(work->target, 0xee, work->size), stream->failed = 1;
        else memcpy(work->target, work->source, work->size);
    }
}

static CUresult give(struct stream *stream, struct work work) {
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->given - stream->made == QUEUE_MAX) return CUDA_ERROR_OUT_OF_MEMORY;
    stream->queue[stream->given++ % QUEUE_MAX] = work;
    return CUDA_SUCCESS;
}

static CUresult copy(CUstream handle, void *target, const void *source, size_t size, const void *host) {
    struct stream *stream = stream_of(handle);
    CUresult result = give(stream, (struct work){target, source, size, NULL, NULL});
    if (!result && (!is_registered(host, size) || getenv("STUB_COPIES_EAGER"))) go_on(stream, stream->given);
    return result;
}

static CUresult single(CUstream handle, void *target, const void *source, size_t size, const void *host) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    if (there("STUB_COPIES_REFUSE")) return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    CUresult result = copy(handle, target, source, size, host);
    stub_singles += !result;
    pthread_mutex_unlock(&lock);
    return result;
}

/* -- the driver's calls -------------------------------------------------------------------------------------------- */

CUresult cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == CUDA_ERROR_LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_OF_THE_STUB";
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) { *count = DEVICES; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(size_t)(CONTEXT + device);
    return device < 0 || device >= DEVICES ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    int device = (int)(size_t)context - CONTEXT;
    if (device < 0 || device >= DEVICES || depth == DEPTH_MAX) return CUDA_ERROR_INVALID_CONTEXT;
    contexts[depth++] = device;
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
    return single(stream, (void *)target, source, size, source);
}

CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t size, CUstream stream) {
    return single(stream, target, (void *)source, size, target);
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
        result = right ? copy(stream, target, source, sizes[at], near ? target : source) : CUDA_ERROR_INVALID_VALUE;
    }
    stub_batches += !result;
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn kernel, void *argument) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    CUresult result = give(stream_of(handle), (struct work){NULL, NULL, 0, kernel, argument});
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult cuStreamSynchronize(CUstream handle) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    if (stream) go_on(stream, stream->given);
    pthread_mutex_unlock(&lock);
    return stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    if (!depth || flags != CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_CONTEXT;
    *event = calloc(1, sizeof **event);
    (*event)->device = contexts[depth - 1];
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream handle) {
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    int right = stream && stream->device == event->device;
    if (right) event->stream = stream, event->position = stream->given;
    pthread_mutex_unlock(&lock);
    return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventQuery(CUevent event) {
    CUresult result = CUDA_ERROR_NOT_READY;
    pthread_mutex_lock(&lock);
    go_on(event->stream, event->position);
    if (event->stream->made >= event->position) {
        result = event->stream->failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
        event->stream->failed = 0;
    }
    pthread_mutex_unlock(&lock);
    return depth ? result : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuEventDestroy_v2(CUevent event) {
    free(event);
    return CUDA_SUCCESS;
}
