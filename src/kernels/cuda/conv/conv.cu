// Convolutions as products of patches. A patch is a row of kernel x kernel x channels values for an
// output pixel. If `upsample` is set, the map is first doubled in both directions.

// Doubles each pixel in both directions. `w` is the width before doubling.
extern "C" __global__ void upsample(const T *x, T *y, u32 w, u32 channels, u32 width, u32 count) {
    u32 i = global_index() * width;
    if (i >= count) return;
    u32 channel = i % channels;
    u32 pixel = i / channels;
    u32 row = pixel / (2 * w), column = pixel % (2 * w);
    // The rows of all images are stacked. Each image has an even number of output rows.
    store(y + i, load(x + ((u64)(row / 2) * w + column / 2) * channels + channel, width), width);
}

// The backward pass of `upsample`: sums the gradients of the four copies of each pixel.
extern "C" __global__ void upsample_backward(
    const T *dy, T *dx, u32 w, u32 channels, int accumulate, u32 width, u32 count
) {
    u32 i = global_index() * width;
    if (i >= count) return;
    u32 channel = i % channels;
    u32 pixel = i / channels;
    u64 at = (2 * (u64)(pixel / w) * 2 * w + 2 * (pixel % w)) * channels + channel;
    Values sum = accumulate ? load(dx + i, width) : zeros();
    for (u32 copy = 0; copy < 4; ++copy) {
        Values more = load(dy + at + (copy / 2 * 2 * w + copy % 2) * channels, width);
        EACH(k) sum.at[k] += more.at[k];
    }
    store(dx + i, sum, width);
}

struct Sizes {
    // Of the input before doubling.
    int h, w, channels;
    int h_out, w_out;
    int kernel, stride, upsample;
};

extern "C" __global__ void gather_patches(const T *x, T *patches, Sizes s, u32 width, u32 count) {
    u32 i = global_index() * width;
    if (i >= count) return;
    int channel = i % s.channels, tap = (i / s.channels) % (s.kernel * s.kernel);
    u32 pixel = i / (s.channels * s.kernel * s.kernel);
    int out_x = pixel % s.w_out, out_y = (pixel / s.w_out) % s.h_out;
    u32 image = pixel / (s.w_out * s.h_out);
    int y = out_y * s.stride + tap / s.kernel - s.kernel / 2;
    int x_ = out_x * s.stride + tap % s.kernel - s.kernel / 2;
    bool inside = y >= 0 && x_ >= 0 && y < s.h << s.upsample && x_ < s.w << s.upsample;
    u64 from = (((u64)image * s.h + (y >> s.upsample)) * s.w + (x_ >> s.upsample)) * s.channels + channel;
    store(patches + i, inside ? load(x + from, width) : zeros(), width);
}

// Computes the gradient of the map from the gradients of patches: for each value, sums over the
// patches that contain it.
extern "C" __global__ void scatter_patches(
    const T *patches, T *dx, Sizes s, int accumulate, u32 width, u32 count
) {
    u32 i = global_index() * width;
    if (i >= count) return;
    int channel = i % s.channels, x = (i / s.channels) % s.w;
    int y = (i / s.channels / s.w) % s.h;
    u32 image = i / (s.channels * s.w * s.h);
    int reach = s.kernel / 2, doubled = s.upsample ? 2 : 1;
    Values sum = accumulate ? load(dx + i, width) : zeros();
    for (int tap = 0; tap < s.kernel * s.kernel; ++tap) {
        for (int copy = 0; copy < doubled * doubled; ++copy) {
            int out_y = y * doubled + copy / doubled + reach - tap / s.kernel;
            int out_x = x * doubled + copy % doubled + reach - tap % s.kernel;
            if (out_y < 0 || out_x < 0 || out_y % s.stride || out_x % s.stride) continue;
            out_y /= s.stride;
            out_x /= s.stride;
            if (out_y >= s.h_out || out_x >= s.w_out) continue;
            u64 pixel = ((u64)image * s.h_out + out_y) * s.w_out + out_x;
            u64 at = (pixel * s.kernel * s.kernel + tap) * s.channels + channel;
            Values more = load(patches + at, width);
            EACH(k) sum.at[k] += more.at[k];
        }
    }
    store(dx + i, sum, width);
}
