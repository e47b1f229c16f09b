// GroupNorm, with the activation that follows it. One block per image (in x) and group (in y).

// The activation, the sizes of the maps, and the number of values that a thread handles at once.
struct Sizes {
    int f;
    u32 channels, pixels, groups, width, count;
    float eps;
    // The distance between the weights of two images: 0 if all images have the same.
    u32 per_image;
};

// The position of a block's group.
struct Group {
    u32 first, size, channels, pixels, width;
    u64 image;
    // Calls `body` for `width` values per thread, with their position and the first channel.
    template <class F> __device__ void each(F body) const {
        // A division per iteration would take longer than the memory accesses.
        u32 packs = size / width, own = threadIdx.x % packs, pixel = threadIdx.x / packs;
        while (pixel < pixels) {
            u32 channel = first + own * width;
            body(image + (u64)pixel * channels + channel, channel);
            own += THREADS % packs;
            pixel += THREADS / packs;
            if (own >= packs) {
                own -= packs;
                ++pixel;
            }
        }
    }
};

__device__ inline Group group_of_block(Sizes s) {
    u32 size = s.channels / gridDim.y;
    return {blockIdx.y * size, size, s.channels, s.pixels, s.width, (u64)blockIdx.x * s.pixels * s.channels};
}

// Normalises and activates values.
__device__ inline Values normalized(
    Values x, float mean, float rstd, const float *weight, const float *bias, Sizes s
) {
    Values w = load_channels(weight, s.width), b = load_channels(bias, s.width);
    EACH(k) x.at[k] = activated(s.f, (x.at[k] - mean) * rstd * w.at[k] + b.at[k]);
    return x;
}

// Computes the normalised and activated map, and each group's mean and reciprocal standard deviation:
// (batch, groups, 2).
extern "C" __global__ void normalize(
    const T *x, T *y, const float *weight, const float *bias, float *statistics, Sizes s
) {
    __shared__ float shared[THREADS / 32];
    Group group = group_of_block(s);
    weight += (u64)blockIdx.x * s.per_image;
    bias += (u64)blockIdx.x * s.per_image;
    u32 width = s.width, count = group.size * s.pixels;
    float sum = 0.0f;
    group.each([&](u64 at, u32) {
        Values values = load(x + at, width);
        EACH(k) sum += values.at[k];
    });
    float mean = block_sum(sum, shared) / count;
    // Squares about the mean need a second pass: the difference of two large sums would cancel.
    sum = 0.0f;
    group.each([&](u64 at, u32) {
        Values values = load(x + at, width);
        EACH(k) if (k < width) sum += (values.at[k] - mean) * (values.at[k] - mean);
    });
    float rstd = 1.0f / sqrtf(block_sum(sum, shared) / count + s.eps);
    if (threadIdx.x == 0) {
        float *own = statistics + 2 * ((u64)blockIdx.x * gridDim.y + blockIdx.y);
        own[0] = mean;
        own[1] = rstd;
    }
    group.each([&](u64 at, u32 channel) {
        Values values = load(x + at, width);
        store(y + at, normalized(values, mean, rstd, weight + channel, bias + channel, s), width);
    });
}

// Computes the same map again from its statistics.
extern "C" __global__ void normalize_again(
    const T *x, T *y, const float *weight, const float *bias, const float *statistics, Sizes s
) {
    u32 width = s.width, i = global_index() * width;
    if (i >= s.count) return;
    u32 channels = s.channels, channel = i % channels;
    u32 image = i / (channels * s.pixels);
    weight += (u64)image * s.per_image;
    bias += (u64)image * s.per_image;
    const float *own = statistics + 2 * (image * s.groups + channel / (channels / s.groups));
    Values values = load(x + i, width);
    store(y + i, normalized(values, own[0], own[1], weight + channel, bias + channel, s), width);
}

// Replaces the gradient `d` of the output by that of the input, plus `more` if it is given. Also
// computes the gradients of weight and bias per image and channel, which are then summed over images.
extern "C" __global__ void normalize_backward(
    const T *x, T *d, const T *more, const float *weight, const float *bias, const float *statistics,
    float *for_weight, float *for_bias, Sizes s
) {
    __shared__ float shared[THREADS / 32];
    __shared__ Values rows_of_sums[THREADS];
    Group group = group_of_block(s);
    weight += (u64)blockIdx.x * s.per_image;
    bias += (u64)blockIdx.x * s.per_image;
    u32 channels = s.channels, pixels = s.pixels, width = s.width, count = group.size * pixels;
    int f = s.f;
    const float *own = statistics + 2 * ((u64)blockIdx.x * gridDim.y + blockIdx.y);
    float mean = own[0], rstd = own[1];

    // Handles as many channels at a time as fit, and divides the threads among them.
    float of_x = 0.0f, of_d = 0.0f;
    for (u32 begin = 0; begin < group.size; begin += THREADS * width) {
        u32 left = (group.size - begin) / width, packs = left < THREADS ? left : THREADS;
        u32 rows = THREADS / packs, row = threadIdx.x / packs;
        u32 channel = group.first + begin + threadIdx.x % packs * width;
        Values w = load_channels(weight + channel, width), b = load_channels(bias + channel, width);
        Values sum_weight = zeros(), sum_bias = zeros();
        for (u32 pixel = row; row < rows && pixel < pixels; pixel += rows) {
            u64 at = group.image + (u64)pixel * channels + channel;
            Values values = load(x + at, width), dy = load(d + at, width);
            EACH(k) {
                float n = (values.at[k] - mean) * rstd;
                float dz = dy.at[k] * derivative(f, n * w.at[k] + b.at[k]);
                sum_weight.at[k] += dz * n;
                sum_bias.at[k] += dz;
            }
        }
        u32 begins = group.first + begin;
        sum_rows(sum_weight, rows_of_sums, packs, width, [&](u32 i, float sum) {
            for_weight[(u64)blockIdx.x * channels + begins + i] = sum;
            of_x += weight[begins + i] * sum;
        });
        sum_rows(sum_bias, rows_of_sums, packs, width, [&](u32 i, float sum) {
            for_bias[(u64)blockIdx.x * channels + begins + i] = sum;
            of_d += weight[begins + i] * sum;
        });
    }
    of_x = block_sum(of_x, shared) / count;
    of_d = block_sum(of_d, shared) / count;
    group.each([&](u64 at, u32 channel) {
        Values values = load(x + at, width), dx = load(d + at, width);
        Values w = load_channels(weight + channel, width), b = load_channels(bias + channel, width);
        EACH(k) {
            float n = (values.at[k] - mean) * rstd;
            float dz = dx.at[k] * derivative(f, n * w.at[k] + b.at[k]);
            dx.at[k] = rstd * (w.at[k] * dz - of_d - n * of_x);
        }
        if (more) {
            values = load(more + at, width);
            EACH(k) dx.at[k] += values.at[k];
        }
        store(d + at, dx, width);
    });
}

// Computes the weight and the bias of each image, (batch, channels), from scales and shifts (batch, 2 channels).
extern "C" __global__ void modulate(
    const float *weight, const float *bias, const T *by, float *weights, float *biases, u32 channels, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    u32 channel = i % channels;
    by += (u64)(i / channels) * 2 * channels + channel;
    float factor = 1.0f + get(by[0]);
    weights[i] = weight[channel] * factor;
    biases[i] = bias[channel] * factor + get(by[channels]);
}

// Computes the gradients of scales and shifts from those of the weights and biases of each image. Replaces the latter
// by their contributions to the gradients of weight and bias.
extern "C" __global__ void modulate_backward(
    const float *weight, const float *bias, const T *by, float *for_weight, float *for_bias, T *d_by, u32 channels,
    u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    u32 channel = i % channels;
    u64 at = (u64)(i / channels) * 2 * channels + channel;
    float factor = 1.0f + get(by[at]), d_weight = for_weight[i], d_bias = for_bias[i];
    d_by[at] = put(d_weight * weight[channel] + d_bias * bias[channel]);
    d_by[at + channels] = put(d_bias);
    for_weight[i] = d_weight * factor;
    for_bias[i] = d_bias * factor;
}
