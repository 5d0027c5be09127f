/* The calls of the CUDA driver that robustkd makes, with memory of the host in place of a GPU's. */
#include <stdlib.h>
#include <string.h>

typedef unsigned long long ptr;
static int alive = 0;

int cuInit(unsigned flags) { return getenv("FAKE_CUDA_FAILS") ? 999 : 0; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = getenv("FAKE_CUDA_EMPTY") ? 0 : 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Fake GPU", size); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 8 : which == 76 ? 9 : -1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &alive; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *context) { return context == &alive ? 0 : 201; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = flags == 1 ? &alive : 0; return 0; }
int cuStreamSynchronize(void *stream) { return stream == &alive ? 0 : 400; }
int cuStreamDestroy_v2(void *stream) { return stream == &alive ? 0 : 400; }
int cuMemAlloc_v2(ptr *address, size_t size) {
    if (size > 1ull << 40) return 2;
    *address = (ptr)malloc(size);
    alive++;
    return 0;
}
int cuMemFree_v2(ptr address) { free((void *)address); alive--; return 0; }
int cuMemcpyHtoDAsync_v2(ptr goal, const void *source, size_t size, void *stream) {
    memcpy((void *)goal, source, size);
    return stream == &alive ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *goal, ptr source, size_t size, void *stream) {
    memcpy(goal, (void *)source, size);
    return stream == &alive ? 0 : 400;
}
int fake_buffers_alive(void) { return alive; }
