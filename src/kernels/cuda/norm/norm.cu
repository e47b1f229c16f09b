// GroupNorm, with the activation that follows it. A block handles one image, or a part of its pixels (in x), and a line
// of channels (in y): one group, or several whose channels together fill 128 bytes. With several, the packs of a line
// and of each group are powers of two. Groups often have fewer channels than 128 bytes hold, and memory is read fastest
// by whole lines.
//
// Images have several parts if a block cannot hold their lines in registers. The sums of the parts are then combined in
// a launch of its own. The number of parts does not depend on the batch, so an image has the same bits in each batch.

// The activation, the sizes of the maps, and the number of values that a thread handles at once.
struct Sizes {
    int f;
    u32 channels, pixels, groups, width, count;
    float eps;
    // The distance between the weights of two images: 0 if all images have the same. The groups of a line. The pixels
    // of a part.
    u32 per_image, line, part;
};

__device__ inline u32 parts_of(Sizes s) { return (s.pixels + s.part - 1) / s.part; }

// The channels and pixels of a block. `packs` is the number of channels in units of `width`, and `at` the position of
// the first one in the image's first pixel.
struct Line {
    u32 first, packs, group, of_group, image, from, to;
    u64 at;
};

__device__ inline Line line_of_block(Sizes s) {
    u32 group = s.channels / s.groups, size = s.line * group, first = blockIdx.y * size, parts = parts_of(s);
    u32 image = blockIdx.x / parts, from = blockIdx.x % parts * s.part;
    u32 to = s.pixels - from < s.part ? s.pixels : from + s.part;
    return {first, size / s.width, blockIdx.y * s.line, group / s.width, image, from, to,
            (u64)image * s.pixels * s.channels + first};
}

// The group of a pack within its line.
__device__ inline u32 own_group(Line line, u32 pack, Sizes s) { return s.line == 1 ? 0 : pack / line.of_group; }

// Visits the packs of a line, one in each of the block's threads at a time.
struct Walk {
    u32 pack, pixel;
    __device__ Walk(Line line) : pack(threadIdx.x % line.packs), pixel(line.from + threadIdx.x / line.packs) {}
    // A division per step would take longer than the memory accesses.
    __device__ void next(u32 jump, u32 rows, u32 packs) {
        pack += jump;
        pixel += rows;
        if (pack >= packs) {
            pack -= packs;
            ++pixel;
        }
    }
};

// Returns the sum over a group of values, one of each thread, to the threads of this group. `shared`: a value
// for each warp and group of a line.
__device__ inline float group_sum(float value, u32 own, u32 packs, u32 line, float *shared) {
    u32 of_group = packs / line, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (u32 other = 16; other > 0; other /= 2) {
        if (line == 1 || other < of_group || other >= packs) value += __shfl_xor_sync(0xffffffffu, value, other);
    }
    __syncthreads();
    if (line == 1) {
        if (lane == 0) shared[warp] = value;
    } else if (lane < packs && lane % of_group == 0) {
        shared[warp * line + lane / of_group] = value;
    }
    __syncthreads();
    value = 0.0f;
    for (u32 k = 0; k < blockDim.x / 32; ++k) value += shared[k * line + own];
    return value;
}

// Sums values of `packs` packs over the rows of threads of a block. Calls `take(channel, sum)` in one thread for each
// channel. `shared`: an element for each thread.
template <class F> __device__ inline void sum_packs(Values own, Values *shared, u32 packs, u32 width, F take) {
    u32 lane = threadIdx.x % 32, rows = blockDim.x / packs;
    bool in_warps = packs < 32 && 32 % packs == 0;
    if (in_warps) {
        rows = blockDim.x / 32;
        for (u32 other = 16; other >= packs; other /= 2) {
            EACH(k) own.at[k] += __shfl_xor_sync(0xffffffffu, own.at[k], other);
        }
    }
    __syncthreads();
    if (!in_warps) shared[threadIdx.x] = own;
    else if (lane < packs) shared[threadIdx.x / 32 * packs + lane] = own;
    __syncthreads();
    for (u32 channel = threadIdx.x; channel < packs * width; channel += blockDim.x) {
        float sum = 0.0f;
        for (u32 row = 0; row < rows; ++row) sum += shared[row * packs + channel / width].at[channel % width];
        take(channel, sum);
    }
}

// Normalises and activates values.
__device__ inline Values normalized(
    Values x, float mean, float rstd, const float *weight, const float *bias, Sizes s
) {
    Values w = load_channels(weight, s.width), b = load_channels(bias, s.width);
    EACH(k) x.at[k] = activated(s.f, (x.at[k] - mean) * rstd * w.at[k] + b.at[k]);
    return x;
}

// The packs that a thread keeps in registers: 128 KiB in a block of 512 threads.
#define HELD 16

// The threads of a block, and the values that all groups of its line need of `group_sum`.
#define MOST 512

// Computes the normalised and activated map, and each group's mean and reciprocal standard deviation:
// (batch, groups, 2). Values may first be added to `x`; see `with_addends`. The sum is then written to `sum`. For
// images in parts, computes only the sum, and for each part and group the mean and the sum of squared deviations from
// it: (batch, parts, groups, 2).
extern "C" __launch_bounds__(MOST) __global__ void normalize(
    const T *x, T *sum, T *y, const float *added, const T *vectors, const T *residual, const T *mask,
    const float *weight, const float *bias, float *statistics, Sizes s
) {
    __shared__ float shared[MOST];
    Line line = line_of_block(s);
    weight += (u64)line.image * s.per_image + line.first;
    bias += (u64)line.image * s.per_image + line.first;
    if (added) added += line.first;
    if (vectors) vectors += (u64)line.image * s.channels + line.first;
    if (mask) mask += (u64)line.image * s.channels + line.first;
    u32 width = s.width, channels = s.channels, to = line.to, packs = line.packs;
    u32 jump = blockDim.x % packs, rows = blockDim.x / packs;
    u64 image = line.at;
    u32 own = own_group(line, threadIdx.x % packs, s), count = line.of_group * width * (to - line.from);
    bool adds = sum != 0;
    Packed held[HELD];

    float total = 0.0f;
    auto first = [&](const Walk &walk) {
        u64 at = image + (u64)walk.pixel * channels + walk.pack * width;
        Packed pack = load_packed(x + at, width);
        if (adds) {
            u32 channel = walk.pack * width;
            Values values = with_addends(
                unpacked(pack, width), added ? added + channel : 0, vectors ? vectors + channel : 0,
                residual ? residual + at : 0, mask ? mask + channel : 0, width
            );
            pack = packed(values);
            store_packed(sum + at, pack, width);
        }
        Values values = unpacked(pack, width);
        EACH(k) total += values.at[k];
        return pack;
    };
    Walk walk(line);
    _Pragma("unroll") for (u32 k = 0; k < HELD; ++k) if (walk.pixel < to) {
        held[k] = first(walk);
        walk.next(jump, rows, packs);
    }
    for (; walk.pixel < to; walk.next(jump, rows, packs)) first(walk);
    float mean = group_sum(total, own, packs, s.line, shared) / count;

    // Squares about the mean need a second pass: the difference of two large sums would cancel.
    const T *from = adds ? sum : x;
    total = 0.0f;
    auto second = [&](Values values) {
        EACH(k) if (k < width) total += (values.at[k] - mean) * (values.at[k] - mean);
    };
    walk = Walk(line);
    _Pragma("unroll") for (u32 k = 0; k < HELD; ++k) if (walk.pixel < to) {
        second(unpacked(held[k], width));
        walk.next(jump, rows, packs);
    }
    for (; walk.pixel < to; walk.next(jump, rows, packs)) {
        second(load(from + image + (u64)walk.pixel * channels + walk.pack * width, width));
    }
    float squares = group_sum(total, own, packs, s.line, shared), rstd = 1.0f / sqrtf(squares / count + s.eps);
    bool in_parts = s.part < s.pixels;
    if (threadIdx.x < packs && threadIdx.x % line.of_group == 0) {
        float *of_own = statistics + 2 * ((u64)blockIdx.x * s.groups + line.group + own);
        of_own[0] = mean;
        of_own[1] = in_parts ? squares : rstd;
    }
    if (in_parts) return;

    auto third = [&](const Walk &walk, Values values) {
        u32 channel = walk.pack * width;
        u64 at = image + (u64)walk.pixel * channels + channel;
        store(y + at, normalized(values, mean, rstd, weight + channel, bias + channel, s), width);
    };
    walk = Walk(line);
    _Pragma("unroll") for (u32 k = 0; k < HELD; ++k) if (walk.pixel < to) {
        third(walk, unpacked(held[k], width));
        walk.next(jump, rows, packs);
    }
    for (; walk.pixel < to; walk.next(jump, rows, packs)) {
        third(walk, load(from + image + (u64)walk.pixel * channels + walk.pack * width, width));
    }
}

// Computes each group's mean and reciprocal standard deviation from those of its parts. One block per image (in x) and
// group (in y).
extern "C" __global__ void statistics_of_parts(const float *of_parts, float *statistics, Sizes s) {
    __shared__ float shared[THREADS / 32];
    u32 parts = parts_of(s), image = blockIdx.x, group = blockIdx.y;
    const float *own = of_parts + 2 * ((u64)image * parts * s.groups + group);
    auto pixels = [=](u32 part) { return (float)(part + 1 < parts ? s.part : s.pixels - part * s.part); };
    float total = 0.0f, squares = 0.0f;
    for (u32 part = threadIdx.x; part < parts; part += THREADS) total += pixels(part) * own[2 * part * s.groups];
    float mean = block_sum(total, shared) / s.pixels, channels = s.channels / s.groups;
    for (u32 part = threadIdx.x; part < parts; part += THREADS) {
        const float *of_part = own + 2 * part * s.groups;
        float off = of_part[0] - mean;
        squares += of_part[1] + channels * pixels(part) * off * off;
    }
    squares = block_sum(squares, shared);
    if (threadIdx.x) return;
    statistics += 2 * ((u64)image * s.groups + group);
    statistics[0] = mean;
    statistics[1] = 1.0f / sqrtf(squares / (channels * s.pixels) + s.eps);
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
