// Muon's orthogonalisation of matrices of one shape. cuBLASLt computes the products.

// Computes 1 / max(norm, least) of each matrix, in one block per matrix, from the sums of squares of its `parts` parts.
extern "C" __global__ void inverse_norms(const double *squares, u32 parts, double least, double *inverse) {
    __shared__ double sums[THREADS];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < parts; i += THREADS) sum += squares[(u64)blockIdx.x * parts + i];
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) inverse[blockIdx.x] = 1.0 / fmax(sqrt(sum), least);
}

// Multiplies each matrix of `size` values by a power of its own factor, 1 or 2.
extern "C" __global__ void scale_matrices(float *x, const double *factors, int power, u32 size, u32 count) {
    u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    double factor = factors[i / size];
    x[i] = (float)(x[i] * (power == 2 ? factor * factor : factor));
}

// Computes `q = a I + b x + c q` for matrices with `rows` rows and columns.
extern "C" __global__ void polynomial(float *q, const float *x, float a, float b, float c, u32 rows, u32 count) {
    u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    u32 at = i % (rows * rows);
    q[i] = c * q[i] + b * x[i] + (at % (rows + 1) == 0 ? a : 0.0f);
}
