// The activation `f` of a value, and its derivative: 0 none, 1 SiLU, 2 GELU.
__device__ inline float activated(int f, float x) {
    if (f == 1) return x / (1.0f + expf(-x));
    if (f == 2) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    return x;
}

__device__ inline float derivative(int f, float x) {
    if (f == 1) {
        float s = 1.0f / (1.0f + expf(-x));
        return s * (1.0f + x * (1.0f - s));
    }
    if (f == 2) return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
    return 1.0f;
}
