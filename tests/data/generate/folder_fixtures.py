"""Pictures in many formats, and their images by Pillow: `python folder_fixtures.py DIRECTORY`."""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps
from safetensors.numpy import save_file

HEIGHT, WIDTH = 14, 20
out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(0)


def colours(height, width):
    """Smooth colours with noise, and saturated squares, at whose edges filters overshoot."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 5 + y / 9), np.cos(x / 7 - y / 4), np.sin(x * y / 90)]
    values = 127 + 100 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    values[height // 4 : height // 2, width // 4 : width // 2] = (255, 0, 255)
    values[height // 3 : height // 2, width // 3 : width // 2] = (0, 255, 0)
    return np.clip(values, 0, 255).astype(np.uint8)


def png16(path, samples):
    """Writes 16-bit samples (height, width, channels), which Pillow cannot."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def box(height, width):
    """The largest box of the images' aspect ratio, in whole pixels around the centre."""
    if width * HEIGHT > WIDTH * height:
        box_height, box_width = height, (height * WIDTH + HEIGHT // 2) // HEIGHT
    else:
        box_height, box_width = (width * HEIGHT + WIDTH // 2) // WIDTH, width
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return (left, top, left + box_width, top + box_height)


def over(rgba, background):
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return np.round(rgba[..., :3] * alpha + np.array(background) * (1 - alpha)).astype(np.uint8)


def scaled(pixels, resample):
    """Scales along the columns, then along the rows. In one call, Pillow chooses the order by the sizes. Overshoots are
    clipped after each pass, so the order changes values at saturated edges."""
    image = Image.fromarray(pixels)
    # Pillow weights by alpha, but again in each call.
    image = image.convert("RGBa") if image.mode == "RGBA" else image
    left, top, right, bottom = box(*pixels.shape[:2])
    columns = image.resize((image.width, HEIGHT), resample, box=(0, top, image.width, bottom))
    image = columns.resize((WIDTH, HEIGHT), resample, box=(left, 0, right, HEIGHT))
    return np.asarray(image.convert("RGBA") if image.mode == "RGBa" else image)


expected = {}


def expect(name, rgba):
    """The images of a picture, whose pixels are RGBA of 8 bits."""
    white = over(rgba, (255, 255, 255))
    cases = {
        "rgb": scaled(white, Image.Resampling.BICUBIC),
        "lanczos": scaled(white, Image.Resampling.LANCZOS),
        "grey": scaled(np.asarray(Image.fromarray(white).convert("L")), Image.Resampling.BICUBIC),
    }
    if (rgba[..., 3] < 255).any():
        cases["rgba"] = scaled(rgba, Image.Resampling.BICUBIC)
        cases["blue"] = scaled(over(rgba, (0, 40, 200)), Image.Resampling.BICUBIC)
    for case, image in cases.items():
        image = image[..., None] if image.ndim == 2 else image
        expected[f"{name}.{case}"] = np.ascontiguousarray(image.transpose(2, 0, 1))


def opened(name):
    """The pixels of a file in RGBA, by Pillow."""
    with Image.open(out / name) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))


def save(name, image, **options):
    image.save(out / name, **options)
    expect(name, opened(name))


# Formats, and sizes: reduced, enlarged, of another aspect ratio either way, and the size of the images.
save("reduced.png", Image.fromarray(colours(45, 64)))
save("wide.bmp", Image.fromarray(colours(30, 71)))
save("high.tiff", Image.fromarray(colours(61, 33)), compression="tiff_lzw")
save("enlarged.webp", Image.fromarray(colours(7, 9)), lossless=True)
save("same.png", Image.fromarray(colours(HEIGHT, WIDTH)))
save("line.png", Image.fromarray(colours(1, 50)))
save("full.jpg", Image.fromarray(colours(48, 64)), quality=95, subsampling=0)
save("progressive.jpg", Image.fromarray(colours(48, 64)), quality=95, subsampling=0, progressive=True)
frames = [Image.fromarray(colours(30, 40)) for _ in range(2)]
save("animated.gif", frames[0], save_all=True, append_images=frames[1:])
save("animated.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True)

# Grey, palettes, one bit.
save("grey.png", Image.fromarray(colours(40, 50)).convert("L"))
save("grey.jpg", Image.fromarray(colours(40, 50)).convert("L"), quality=95)
save("palette.png", Image.fromarray(colours(40, 50)).quantize(20))
save("bit.png", Image.fromarray(colours(40, 50)).convert("1"))

# Alpha.
y, x = np.mgrid[0:40, 0:50]
alpha = np.clip(x * 8 - 60 + rng.normal(0, 30, x.shape), 0, 255).astype(np.uint8)
rgba = np.dstack([colours(40, 50), alpha])
save("alpha.png", Image.fromarray(rgba))
# With `exact`, transparent pixels keep their colours.
save("alpha.webp", Image.fromarray(rgba), lossless=True, exact=True)
save("grey-alpha.png", Image.fromarray(rgba).convert("LA"))
save("transparent.gif", Image.fromarray(rgba).quantize(30, method=Image.Quantize.FASTOCTREE))

# 16 bits. The expected samples are v / 257, rounded.
samples = rng.integers(0, 65536, (30, 40, 4)).astype(np.uint16)
samples[..., :3] = colours(30, 40).astype(np.uint16) * 250 + 7
eight = np.round(samples / 257).astype(np.uint8)
opaque = np.full((30, 40, 1), 255, np.uint8)
grey = np.dstack([eight[..., :1]] * 3 + [opaque])
for name, picture, rgba in [
    ("grey16.png", samples[..., :1], grey),
    ("rgb16.png", samples[..., :3], np.dstack([eight[..., :3], opaque])),
    ("rgba16.png", samples, eight),
]:
    png16(out / name, picture)
    expect(name, rgba)
Image.fromarray(samples[..., 0]).save(out / "grey16.tiff", compression="tiff_lzw")
expect("grey16.tiff", grey)

# Orientations.
for orientation in range(1, 9):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(colours(12, 17))
    save(f"exif{orientation}.jpg", picture, quality=95, subsampling=0, exif=exif)
    if orientation == 6:
        save("exif6.png", picture, exif=exif)
        save("exif6.webp", picture, exif=exif, lossless=True)
        save("exif6.tiff", picture, tiffinfo={0x0112: 6})

save_file(expected, out / "expected.safetensors", {"pillow": PIL.__version__})
