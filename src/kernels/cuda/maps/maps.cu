// Elementwise operations on maps and vectors.

// Moves the channels of f32 (batch, channels, pixels) to (batch, pixels, channels). Converts images to maps,
// and weights (out, in, kernel, kernel) to the rows (out, kernel, kernel, in) by which patches are
// multiplied.
extern "C" __global__ void images_to_map(const float *x, T *y, u32 channels, u32 pixels, u32 count) {
    u32 i = global_index();
    if (i >= count) return;
    u32 image = i / (channels * pixels);
    u32 channel = i % channels, pixel = (i / channels) % pixels;
    y[i] = put(x[(image * channels + channel) * pixels + pixel]);
}

// The inverse, for maps and for gradients of weights.
extern "C" __global__ void map_to_images(const T *x, float *y, u32 channels, u32 pixels, u32 count) {
    u32 i = global_index();
    if (i >= count) return;
    u32 image = i / (channels * pixels);
    u32 pixel = i % pixels, channel = (i / pixels) % channels;
    y[i] = get(x[(image * pixels + pixel) * channels + channel]);
}

extern "C" __global__ void add(T *sum, const T *more, u32 width, u32 count) {
    u32 i = global_index() * width;
    if (i >= count) return;
    Values values = load(sum + i, width), others = load(more + i, width);
    EACH(k) values.at[k] += others.at[k];
    store(sum + i, values, width);
}

// Adds values to a map, and multiplies the sum by a mask; see `with_addends`. `y` may be `x`.
extern "C" __global__ void add_to_map(
    const T *x, T *y, const float *bias, const T *per_image, const T *residual, const T *mask, u32 channels,
    u32 pixels, u32 width, u32 count
) {
    u32 i = global_index() * width;
    if (i >= count) return;
    u32 channel = i % channels, vector = i / (channels * pixels) * channels + channel;
    Values sum = with_addends(
        load(x + i, width), bias ? bias + channel : 0, per_image ? per_image + vector : 0,
        residual ? residual + i : 0, mask ? mask + vector : 0, width
    );
    store(y + i, sum, width);
}

extern "C" __global__ void concatenate(
    const T *a, const T *b, T *y, u32 first, u32 second, u32 width, u32 count
) {
    u32 i = global_index() * width;
    if (i >= count) return;
    u32 pixel = i / (first + second), channel = i % (first + second);
    const T *from = channel < first ? a + pixel * first + channel : b + pixel * second + channel - first;
    store(y + i, load(from, width), width);
}

extern "C" __global__ void split(
    const T *y, T *a, T *b, u32 first, u32 second, u32 width, u32 count
) {
    u32 i = global_index() * width;
    if (i >= count) return;
    u32 pixel = i / (first + second), channel = i % (first + second);
    T *to = channel < first ? a + pixel * first + channel : b + pixel * second + channel - first;
    store(to, load(y + i, width), width);
}

// Repeats each pixel in both directions, times `factor`. `w` is the width before doubling.
extern "C" __global__ void repeat_pixels(
    const T *x, T *y, u32 w, u32 channels, float factor, u32 width, u32 count
) {
    u32 i = global_index() * width;
    if (i >= count) return;
    u32 channel = i % channels;
    u32 pixel = i / channels;
    u32 row = pixel / (2 * w), column = pixel % (2 * w);
    // The rows of all images are stacked. Each image has an even number of output rows.
    Values values = load(x + ((u64)(row / 2) * w + column / 2) * channels + channel, width);
    EACH(k) values.at[k] *= factor;
    store(y + i, values, width);
}

// Sums two by two pixels, times `factor`. `w` is the width of the sums. This is the backward pass of `repeat_pixels`.
extern "C" __global__ void sum_pixels(
    const T *x, T *y, u32 w, u32 channels, float factor, int accumulate, u32 width, u32 count
) {
    u32 i = global_index() * width;
    if (i >= count) return;
    u32 channel = i % channels;
    u32 pixel = i / channels;
    u64 at = (2 * (u64)(pixel / w) * 2 * w + 2 * (pixel % w)) * channels + channel;
    Values sum = accumulate ? load(y + i, width) : zeros();
    for (u32 copy = 0; copy < 4; ++copy) {
        Values more = load(x + at + (copy / 2 * 2 * w + copy % 2) * channels, width);
        EACH(k) sum.at[k] += factor * more.at[k];
    }
    store(y + i, sum, width);
}

// Computes the sums over the pixels of each image: (batch, channels). One block per image (in x) and per 32
// widths of channels (in y). Its threads are divided over rows of pixels. With a mask, the map is first replaced by
// its product with the mask.
extern "C" __global__ void sums_by_image(
    T *x, const T *mask, float *sums, T *also, u32 channels, u32 pixels, u32 width
) {
    __shared__ Values shared[THREADS];
    u32 first = blockIdx.y * 32 * width, left = (channels - first) / width;
    u32 packs = left < 32 ? left : 32, rows = THREADS / packs;
    u32 row = threadIdx.x / packs, channel = first + threadIdx.x % packs * width;
    Values sum = zeros(), factors = zeros();
    if (mask) factors = load(mask + (u64)blockIdx.x * channels + channel, width);
    for (u32 pixel = row; row < rows && pixel < pixels; pixel += rows) {
        T *at = x + ((u64)blockIdx.x * pixels + pixel) * channels + channel;
        Values more = load(at, width);
        if (mask) {
            EACH(k) more.at[k] = __fmul_rn(more.at[k], factors.at[k]);
            store(at, more, width);
        }
        EACH(k) sum.at[k] += more.at[k];
    }
    sum_rows(sum, shared, packs, width, [&](u32 own, float total) {
        u64 i = (u64)blockIdx.x * channels + first + own;
        sums[i] = total;
        if (also) also[i] = put(total);
    });
}

// Sums over the rows of a matrix (rows, columns) in f32, at the address `x`, to a vector at the address `sums`. Its
// blocks, one for each 32 columns, begin with number `first`.
struct Columns {
    u64 x, sums;
    u32 rows, columns, first, unused;
};

struct AllColumns {
    Columns at[64];
};

// Computes the sums of `matrices` matrices. Blocks have 32 columns by 8 rows.
extern "C" __global__ void column_sums(AllColumns all, u32 matrices) {
    __shared__ double rows[8][33];
    u32 own = 0;
    while (own + 1 < matrices && blockIdx.x >= all.at[own + 1].first) ++own;
    const float *x = (const float *)all.at[own].x;
    u32 columns = all.at[own].columns, count = all.at[own].rows;
    u32 column = (blockIdx.x - all.at[own].first) * 32 + threadIdx.x;
    double sum = 0.0;
    if (column < columns) {
        for (u32 row = threadIdx.y; row < count; row += 8) sum += x[(u64)row * columns + column];
    }
    rows[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= columns) return;
    sum = 0.0;
    for (int row = 0; row < 8; ++row) sum += rows[row][threadIdx.x];
    ((float *)all.at[own].sums)[column] = (float)sum;
}
