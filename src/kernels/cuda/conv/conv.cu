// Convolutions as products of patches. A patch is a row of kernel x kernel x channels values for an
// output pixel. If `upsample` is set, the map is first doubled in both directions.

struct Sizes {
    // Of the input before doubling.
    int h, w, channels;
    int h_out, w_out;
    int kernel, stride, pad, upsample;
};

extern "C" __global__ void gather_patches(const T *x, T *patches, Sizes s, u32 width, u32 count) {
    u32 i = global_index() * width;
    if (i >= count) return;
    int channel = i % s.channels, tap = (i / s.channels) % (s.kernel * s.kernel);
    u32 pixel = i / (s.channels * s.kernel * s.kernel);
    int out_x = pixel % s.w_out, out_y = (pixel / s.w_out) % s.h_out;
    u32 image = pixel / (s.w_out * s.h_out);
    int y = out_y * s.stride + tap / s.kernel - s.pad;
    int x_ = out_x * s.stride + tap % s.kernel - s.pad;
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
    int doubled = s.upsample ? 2 : 1;
    Values sum = accumulate ? load(dx + i, width) : zeros();
    for (int tap = 0; tap < s.kernel * s.kernel; ++tap) {
        for (int copy = 0; copy < doubled * doubled; ++copy) {
            int out_y = y * doubled + copy / doubled + s.pad - tap / s.kernel;
            int out_x = x * doubled + copy % doubled + s.pad - tap % s.kernel;
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
