// The arithmetic of the diffusion process on images in f32.

// Computes a x + b y with the factors of each image's timestep from `table` (timesteps, 2). A
// timestep out of range gives NaN, because returning an error would wait for the device.
extern "C" __global__ void mix(
    const float *x, const float *y, const u32 *t, const float *table, u32 timesteps, float *sum,
    u64 image, u64 count
) {
    u64 i = global_index();
    if (i >= count) return;
    u32 own = t[i / image];
    if (own >= timesteps) {
        sum[i] = not_a_number();
        return;
    }
    const float *factors = table + 2 * own;
    sum[i] = factors[0] * x[i] + factors[1] * y[i];
}

extern "C" __global__ void combine(
    const float *x, float a, const float *y, float b, float *sum, u64 count
) {
    u64 i = global_index();
    if (i < count) sum[i] = a * x[i] + b * y[i];
}

extern "C" __global__ void clamp(const float *x, float low, float high, float *y, u64 count) {
    u64 i = global_index();
    // NaN stays NaN.
    if (i < count) y[i] = x[i] < low ? low : x[i] > high ? high : x[i];
}

// Computes the gradient of a squared error, times `scale` if it is given, and the sums of squares of
// THREADS values each.
extern "C" __global__ void squared_error(
    const float *output, const float *target, float factor, const float *scale, float *gradient, float *squares,
    u64 count
) {
    __shared__ float shared[THREADS / 32];
    u64 i = global_index();
    float error = i < count ? output[i] - target[i] : 0.0f;
    if (i < count) gradient[i] = error * (scale ? factor * *scale : factor);
    float sum = block_sum(error * error, shared);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// Computes `scale` times the sum of all values, in one block.
extern "C" __global__ void total(const float *x, double scale, float *y, u64 count) {
    __shared__ double sums[THREADS];
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < count; i += THREADS) sum += x[i];
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) *y = (float)(sum * scale);
}
