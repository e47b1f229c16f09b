// The softmax of attention by matrix products, and its backward pass.

// Computes the softmax of each row in place. One block per row.
extern "C" __global__ void softmax(T *x, u32 columns) {
    __shared__ float shared[THREADS / 32];
    T *row = x + (u64)blockIdx.x * columns;
    float most = -infinite();
    for (u32 i = threadIdx.x; i < columns; i += THREADS) most = fmaxf(most, get(row[i]));
    most = block_max(most, shared);
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < columns; i += THREADS) sum += expf(get(row[i]) - most);
    sum = block_sum(sum, shared);
    for (u32 i = threadIdx.x; i < columns; i += THREADS) row[i] = put(expf(get(row[i]) - most) / sum);
}

// Replaces the gradient `d` of the softmax's output `y` by that of its input.
extern "C" __global__ void softmax_backward(const T *y, T *d, u32 columns) {
    __shared__ float shared[THREADS / 32];
    y += (u64)blockIdx.x * columns;
    d += (u64)blockIdx.x * columns;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < columns; i += THREADS) sum += get(y[i]) * get(d[i]);
    sum = block_sum(sum, shared);
    for (u32 i = threadIdx.x; i < columns; i += THREADS) d[i] = put(get(y[i]) * (get(d[i]) - sum));
}
