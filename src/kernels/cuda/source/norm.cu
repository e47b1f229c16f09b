// GroupNorm and what follows it. A block for each group (in x) of each image (in y).

#define EPS 1e-5f

// Goes over a group's values by a block, a value a thread: `at` is where, `channel` which. Not by a
// division each: they would take longer than memory does.
#define FOR_GROUP(body)                                                                                    \
    {                                                                                                      \
        u32 own = threadIdx.x % group, pixel = threadIdx.x / group;                                        \
        while (pixel < pixels) {                                                                           \
            u32 channel = first + own;                                                                     \
            u64 at = image + (u64)pixel * channels + channel;                                              \
            body;                                                                                          \
            own += THREADS % group;                                                                        \
            pixel += THREADS / group;                                                                      \
            if (own >= group) {                                                                            \
                own -= group;                                                                              \
                ++pixel;                                                                                   \
            }                                                                                              \
        }                                                                                                  \
    }

// The normalised and activated map, and each group's mean and reciprocal deviation: (batch, groups, 2).
extern "C" __global__ void normalize(
    const T *x, T *y, const float *weight, const float *bias, float *statistics, int f, u32 channels,
    u32 pixels
) {
    __shared__ float shared[THREADS / 32];
    u32 group = channels / gridDim.x, first = blockIdx.x * group, count = group * pixels;
    u64 image = (u64)blockIdx.y * pixels * channels;
    float sum = 0.0f;
    FOR_GROUP(sum += get(x[at]))
    float mean = block_sum(sum, shared) / count;
    // In a second pass: the difference of two large sums would cancel.
    sum = 0.0f;
    FOR_GROUP(float off = get(x[at]) - mean; sum += off * off)
    float rstd = 1.0f / sqrtf(block_sum(sum, shared) / count + EPS);
    if (threadIdx.x == 0) {
        float *own = statistics + 2 * ((u64)blockIdx.y * gridDim.x + blockIdx.x);
        own[0] = mean;
        own[1] = rstd;
    }
    FOR_GROUP(y[at] = put(activated(f, (get(x[at]) - mean) * rstd * weight[channel] + bias[channel])))
}

// The same map once more.
extern "C" __global__ void normalize_again(
    const T *x, T *y, const float *weight, const float *bias, const float *statistics, int f,
    u32 channels, u32 pixels, u32 groups, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    u32 channel = i % channels;
    u32 image = i / (channels * pixels);
    const float *own = statistics + 2 * (image * groups + channel / (channels / groups));
    y[i] = put(activated(f, (get(x[i]) - own[0]) * own[1] * weight[channel] + bias[channel]));
}

// Makes the gradient `d` of the output that of the input, adding `more` where it is given; and sums up,
// for each image and channel, what the gradients of weight and bias are the sums of over images.
extern "C" __global__ void normalize_backward(
    const T *x, T *d, const T *more, const float *weight, const float *bias, const float *statistics,
    float *for_weight, float *for_bias, int f, u32 channels, u32 pixels
) {
    __shared__ float shared[THREADS / 32];
    __shared__ float by_weight[THREADS], by_bias[THREADS];
    u32 group = channels / gridDim.x, first = blockIdx.x * group, count = group * pixels;
    u64 image = (u64)blockIdx.y * pixels * channels;
    const float *own = statistics + 2 * ((u64)blockIdx.y * gridDim.x + blockIdx.x);
    float mean = own[0], rstd = own[1];

    // As many channels at a time as fit, each with as many threads as fit.
    float of_x = 0.0f, of_d = 0.0f;
    for (u32 begin = 0; begin < group; begin += THREADS) {
        u32 width = group - begin < THREADS ? group - begin : THREADS;
        u32 rows = THREADS / width, row = threadIdx.x / width;
        u32 channel = first + begin + threadIdx.x % width;
        float sum_weight = 0.0f, sum_bias = 0.0f;
        if (row < rows) {
            for (u32 pixel = row; pixel < pixels; pixel += rows) {
                u64 at = image + (u64)pixel * channels + channel;
                float n = (get(x[at]) - mean) * rstd;
                float dz = get(d[at]) * derivative(f, n * weight[channel] + bias[channel]);
                sum_weight += dz * n;
                sum_bias += dz;
            }
        }
        __syncthreads();
        by_weight[threadIdx.x] = sum_weight;
        by_bias[threadIdx.x] = sum_bias;
        __syncthreads();
        if (threadIdx.x < width) {
            for (u32 other = 1; other < rows; ++other) {
                sum_weight += by_weight[other * width + threadIdx.x];
                sum_bias += by_bias[other * width + threadIdx.x];
            }
            u64 at = (u64)blockIdx.y * channels + channel;
            for_weight[at] = sum_weight;
            for_bias[at] = sum_bias;
            of_x += weight[channel] * sum_weight;
            of_d += weight[channel] * sum_bias;
        }
    }
    of_x = block_sum(of_x, shared) / count;
    of_d = block_sum(of_d, shared) / count;
    FOR_GROUP(
        float n = (get(x[at]) - mean) * rstd;
        float dz = get(d[at]) * derivative(f, n * weight[channel] + bias[channel]);
        float dx = rstd * (weight[channel] * dz - of_d - n * of_x);
        d[at] = put(more ? dx + get(more[at]) : dx)
    )
}
