/* The calls of libcuda.so.1 that nobody emulates yet: each says "not initialised".
 *
 * kvikio looks these symbols up even to move host buffers; with them its real host path runs on a machine without an NVIDIA
 * driver. All are weak: tests/cuda/device.c, which is linked before, has many of them, and tests/cuda/build.py builds the library.
 */

enum { SUCCESS = 0, NOT_INITIALIZED = 3, DRIVER_VERSION = 13000 };

__attribute__((weak)) int cuDriverGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }

#define REFUSE(name) __attribute__((weak)) int name(void) { return NOT_INITIALIZED; }
#define REFUSE_ALL_VERSIONS(name) REFUSE(name) REFUSE(name##_v2) REFUSE(name##_v3) REFUSE(name##_v4)

REFUSE(cuInit) REFUSE(cuGetErrorName) REFUSE(cuGetErrorString)
REFUSE_ALL_VERSIONS(cuMemHostAlloc) REFUSE_ALL_VERSIONS(cuMemFreeHost)
REFUSE_ALL_VERSIONS(cuMemHostRegister) REFUSE_ALL_VERSIONS(cuMemHostUnregister)
REFUSE_ALL_VERSIONS(cuMemcpyHtoDAsync) REFUSE_ALL_VERSIONS(cuMemcpyDtoHAsync) REFUSE_ALL_VERSIONS(cuMemcpyAsync)
REFUSE_ALL_VERSIONS(cuPointerGetAttribute) REFUSE_ALL_VERSIONS(cuPointerGetAttributes)
REFUSE_ALL_VERSIONS(cuCtxCreate) REFUSE_ALL_VERSIONS(cuCtxDestroy) REFUSE_ALL_VERSIONS(cuCtxPushCurrent)
REFUSE_ALL_VERSIONS(cuCtxPopCurrent) REFUSE_ALL_VERSIONS(cuCtxGetCurrent) REFUSE_ALL_VERSIONS(cuCtxGetDevice)
REFUSE_ALL_VERSIONS(cuMemGetAddressRange) REFUSE_ALL_VERSIONS(cuDeviceGet) REFUSE_ALL_VERSIONS(cuDeviceGetCount)
REFUSE_ALL_VERSIONS(cuDeviceGetAttribute) REFUSE_ALL_VERSIONS(cuDevicePrimaryCtxRetain)
REFUSE_ALL_VERSIONS(cuDevicePrimaryCtxRelease) REFUSE_ALL_VERSIONS(cuStreamSynchronize)
REFUSE_ALL_VERSIONS(cuStreamCreate) REFUSE_ALL_VERSIONS(cuStreamDestroy) REFUSE_ALL_VERSIONS(cuEventSynchronize)
REFUSE_ALL_VERSIONS(cuEventCreate) REFUSE_ALL_VERSIONS(cuEventDestroy) REFUSE_ALL_VERSIONS(cuEventRecord)
REFUSE_ALL_VERSIONS(cuEventQuery) REFUSE_ALL_VERSIONS(cuLaunchHostFunc) REFUSE_ALL_VERSIONS(cuMemcpyBatchAsync)
