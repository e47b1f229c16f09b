// Handles that candle makes when it opens a device, and the crate never uses.
#define API extern "C" __attribute__((visibility("default")))
#if defined(CUBLAS)
API int cublasCreate_v2(void **handle) { return *handle = (void *)1, 0; }
API int cublasDestroy_v2(void *) { return 0; }
API int cublasSetStream_v2(void *, void *) { return 0; }
#elif defined(CURAND)
API int curandCreateGenerator(void **handle, int) { return *handle = (void *)1, 0; }
API int curandDestroyGenerator(void *) { return 0; }
API int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }
API int curandSetStream(void *, void *) { return 0; }
#elif defined(CUDART)
API int cudaMalloc(void **, unsigned long) { return 2; }
#endif
