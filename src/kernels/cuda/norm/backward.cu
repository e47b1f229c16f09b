// The backward pass of a normalisation.

// The operands of the backward pass. `weight`, `bias` and `for_image`, the position in vectors (batch, channels), are
// those of the line's first channel.
struct Backward {
    const T *x;
    T *d;
    const T *more;
    const float *weight, *bias;
    Line line;
    u32 own;
    float mean, rstd;
    u64 for_image;

    __device__ Backward(
        const T *x, T *d, const T *more, const float *weight, const float *bias, const float *statistics, Sizes s
    ) : x(x), d(d), more(more), line(line_of_block(s)) {
        this->weight = weight + (u64)line.image * s.per_image + line.first;
        this->bias = bias + (u64)line.image * s.per_image + line.first;
        // With several groups, all packs of a line are visited at a time.
        own = own_group(line, threadIdx.x % line.packs, s);
        const float *of_own = statistics + 2 * ((u64)line.image * s.groups + line.group + own);
        mean = of_own[0];
        rstd = of_own[1];
        for_image = (u64)line.image * s.channels + line.first;
    }
};

// The channels that a block handles at a time, from channel `first` of its line on. A thread handles one pack of them,
// in every n-th pixel, where n is `rows`. Some threads may have none.
struct Run {
    u32 first, packs, rows, pixel, channel;
};

// Calls `f` for as many channels at a time as there are threads.
template <class F> __device__ inline void each_run(Line line, u32 width, F f) {
    for (u32 first = 0; first < line.packs; first += blockDim.x) {
        u32 left = line.packs - first, packs = left < blockDim.x ? left : blockDim.x;
        u32 rows = blockDim.x / packs, row = threadIdx.x / packs;
        u32 pixel = row < rows ? line.from + row : line.to;
        f(Run{first * width, packs, rows, pixel, (first + threadIdx.x % packs) * width});
    }
}

// The sums over a group from which the gradient of the input is computed. With the gradient of the normalised values:
// `of_x` is the sum of this gradient times the values, and `of_d` is the sum of this gradient.
struct GroupSums {
    float of_x, of_d;

    __device__ void add(Values w, Values for_weight, Values for_bias) {
        EACH(k) {
            of_x += w.at[k] * for_weight.at[k];
            of_d += w.at[k] * for_bias.at[k];
        }
    }

    // Replaces the terms of the threads by the means over a group.
    __device__ void finish(const Backward &b, Sizes s, float *shared) {
        u32 count = b.line.of_group * s.width * s.pixels;
        of_x = group_sum(of_x, b.own, b.line.packs, s.line, shared) / count;
        of_d = group_sum(of_d, b.own, b.line.packs, s.line, shared) / count;
    }
};

// Computes the sums of the gradients of weight and bias over a block's pixels. Calls `take(channel, sum)` for the
// weight, or `take_bias`, in one thread for each channel of the line. Returns the thread's terms of the group's sums.
template <class F, class G>
__device__ inline GroupSums sum_gradients(const Backward &b, Sizes s, Values *rows_of_sums, F take, G take_bias) {
    GroupSums sums = {0.0f, 0.0f};
    u32 width = s.width, channels = s.channels;
    each_run(b.line, width, [&](Run run) {
        Values w = load_channels(b.weight + run.channel, width), bias = load_channels(b.bias + run.channel, width);
        Values sum_weight = zeros(), sum_bias = zeros();
        _Pragma("unroll 2") for (u32 pixel = run.pixel; pixel < b.line.to; pixel += run.rows) {
            u64 at = b.line.at + (u64)pixel * channels + run.channel;
            Values values = load(b.x + at, width), dy = load(b.d + at, width);
            EACH(k) {
                float n = (values.at[k] - b.mean) * b.rstd;
                float dz = dy.at[k] * derivative(s.f, n * w.at[k] + bias.at[k]);
                sum_weight.at[k] += dz * n;
                sum_bias.at[k] += dz;
            }
        }
        sums.add(w, sum_weight, sum_bias);
        sum_packs(sum_weight, rows_of_sums, run.packs, width, [&](u32 i, float sum) { take(run.first + i, sum); });
        sum_packs(sum_bias, rows_of_sums, run.packs, width, [&](u32 i, float sum) { take_bias(run.first + i, sum); });
    });
    return sums;
}

// Replaces the gradient of the output by that of the input. Calls `take(channel, sum)` with its sums over a block's
// pixels, in one thread for each channel of the line.
template <class F>
__device__ inline void replace_gradient(const Backward &b, Sizes s, GroupSums sums, Values *rows_of_sums, F take) {
    u32 width = s.width, channels = s.channels;
    each_run(b.line, width, [&](Run run) {
        Values w = load_channels(b.weight + run.channel, width), bias = load_channels(b.bias + run.channel, width);
        Values sum = zeros();
        _Pragma("unroll 2") for (u32 pixel = run.pixel; pixel < b.line.to; pixel += run.rows) {
            u64 at = b.line.at + (u64)pixel * channels + run.channel;
            Values values = load(b.x + at, width), dx = load(b.d + at, width);
            EACH(k) {
                float n = (values.at[k] - b.mean) * b.rstd;
                float dz = dx.at[k] * derivative(s.f, n * w.at[k] + bias.at[k]);
                dx.at[k] = b.rstd * (w.at[k] * dz - sums.of_d - n * sums.of_x);
            }
            if (b.more) {
                values = load(b.more + at, width);
                EACH(k) dx.at[k] += values.at[k];
            }
            EACH(k) if (k < width) sum.at[k] += dx.at[k];
            store(b.d + at, dx, width);
        }
        sum_packs(sum, rows_of_sums, run.packs, width, [&](u32 i, float total) { take(run.first + i, total); });
    });
}

// Replaces the gradient `d` of the output by that of the input, plus `more` if it is given. Also computes, per image
// and channel, the gradients of weight and bias, and the sums of the new `d` over the pixels: `sums`, and `also` in the
// type of maps unless it is null. Images have one part.
extern "C" __launch_bounds__(MOST) __global__ void normalize_backward(
    const T *x, T *d, const T *more, const float *weight, const float *bias, const float *statistics,
    float *for_weight, float *for_bias, float *sums, T *also, Sizes s
) {
    __shared__ float shared[MOST];
    __shared__ Values rows_of_sums[MOST];
    Backward b(x, d, more, weight, bias, statistics, s);
    u64 vector = b.for_image;
    GroupSums of_group = sum_gradients(
        b, s, rows_of_sums, [=](u32 i, float sum) { for_weight[vector + i] = sum; },
        [=](u32 i, float sum) { for_bias[vector + i] = sum; }
    );
    of_group.finish(b, s, shared);
    replace_gradient(b, s, of_group, rows_of_sums, [=](u32 i, float total) {
        sums[vector + i] = total;
        if (also) also[vector + i] = put(total);
    });
}

// Computes the sums of the gradients of weight and bias over the pixels of each part: (batch, parts, 2 channels).
extern "C" __launch_bounds__(MOST) __global__ void sum_gradients_of_parts(
    const T *x, T *d, const float *weight, const float *bias, const float *statistics, float *of_parts, Sizes s
) {
    __shared__ Values rows_of_sums[MOST];
    Backward b(x, d, 0, weight, bias, statistics, s);
    float *for_weight = of_parts + 2 * (u64)blockIdx.x * s.channels + b.line.first, *for_bias = for_weight + s.channels;
    sum_gradients(
        b, s, rows_of_sums, [=](u32 i, float sum) { for_weight[i] = sum; }, [=](u32 i, float sum) { for_bias[i] = sum; }
    );
}

// Replaces the gradient like `normalize_backward`, from the complete gradients of weight and bias. Computes the sums of
// the new `d` over the pixels of each part: (batch, parts, channels).
extern "C" __launch_bounds__(MOST) __global__ void replace_gradient_of_parts(
    const T *x, T *d, const T *more, const float *weight, const float *bias, const float *statistics,
    const float *for_weight, const float *for_bias, float *of_parts, Sizes s
) {
    __shared__ float shared[MOST];
    __shared__ Values rows_of_sums[MOST];
    Backward b(x, d, more, weight, bias, statistics, s);
    GroupSums sums = {0.0f, 0.0f};
    each_run(b.line, s.width, [&](Run run) {
        if (threadIdx.x >= run.packs) return;
        u64 at = b.for_image + run.channel;
        sums.add(
            load_channels(b.weight + run.channel, s.width), load_channels(for_weight + at, s.width),
            load_channels(for_bias + at, s.width)
        );
    });
    sums.finish(b, s, shared);
    of_parts += (u64)blockIdx.x * s.channels + b.line.first;
    replace_gradient(b, s, sums, rows_of_sums, [=](u32 i, float total) { of_parts[i] = total; });
}

// Sums vectors (batch, parts, columns) over the parts of each image. The first `channels` columns go to `sums`
// (batch, channels), and to `also` in the type of maps unless it is null. Any further ones go to `more`. Blocks have 32
// columns (in y) by 8 parts.
extern "C" __global__ void sum_of_parts(
    const float *of_parts, float *sums, float *more, T *also, u32 parts, u32 channels, u32 columns
) {
    __shared__ double rows[8][33];
    u32 column = blockIdx.y * 32 + threadIdx.x;
    double sum = 0.0;
    if (column < columns) {
        const float *own = of_parts + (u64)blockIdx.x * parts * columns + column;
        _Pragma("unroll 4") for (u32 part = threadIdx.y; part < parts; part += 8) sum += own[(u64)part * columns];
    }
    rows[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= columns) return;
    sum = 0.0;
    for (u32 row = 0; row < 8; ++row) sum += rows[row][threadIdx.x];
    u64 vector = (u64)blockIdx.x * channels;
    if (column >= channels) {
        more[vector + column - channels] = (float)sum;
        return;
    }
    sums[vector + column] = (float)sum;
    if (also) also[vector + column] = put((float)sum);
}
