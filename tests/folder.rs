//! Folders of pictures: their values beside Pillow's, the files that are found and refused, random crops, memory, the
//! cache, and the batches of training.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;

use candle_core::{Device, Tensor};
use ddpm::data::folder::{
    Channels, Crop, Filter, Folder, FolderConfig, Progress, Stage, Unreadable, UnreadableFile,
    read_mask, read_picture,
};
use ddpm::data::{Dataset, ImageShape};
use ddpm::{Diffusion, Error, Result, TrainConfig, Trainer};
use image::{DynamicImage, GrayImage, ImageFormat, Rgb, RgbImage};
use tempfile::{TempDir, tempdir};

mod small;
use small::Scale;

const FIXTURES: &str = "tests/data/folder";

/// The size of the fixtures' images.
fn config() -> FolderConfig {
    FolderConfig { height: 14, width: 20, channels: Channels::Rgb, ..FolderConfig::default() }
}

fn skipping() -> FolderConfig {
    FolderConfig { unreadable: Unreadable::Skip, ..config() }
}

fn read(folder: &Folder, index: usize) -> Vec<u8> {
    let mut pixels = vec![7; folder.shape().values().unwrap()];
    folder.read(index, &mut pixels).unwrap();
    pixels
}

fn all(folder: &Folder) -> Vec<Vec<u8>> {
    (0..folder.len()).map(|index| read(folder, index)).collect()
}

fn paths(folder: &Folder) -> Vec<String> {
    let path = |index| folder.path(index).unwrap().to_str().unwrap().replace('\\', "/");
    (0..folder.len()).map(path).collect()
}

fn unreadable(folder: &Folder) -> Vec<(String, &str)> {
    let file = |file: &'_ UnreadableFile| file.path.to_str().unwrap().replace('\\', "/");
    folder.unreadable().iter().map(|u| (file(u), &*u.reason)).collect()
}

fn message(result: Result<Folder>) -> String {
    result.err().map(|error| error.to_string()).unwrap_or_default()
}

/// A picture with few equal pixels.
fn picture(width: u32, height: u32, seed: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([x * 7 + seed * 31, y * 11 + seed, (x ^ y) * 5 + seed * 3].map(|v| (v % 256) as u8))
    })
}

fn content(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut content = std::io::Cursor::new(Vec::new());
    image.into().write_to(&mut content, format).unwrap();
    content.into_inner()
}

fn put(dir: &Path, name: &str, content: impl AsRef<[u8]>) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// A folder of PNG files of these names.
fn folder_of(names: &[&str]) -> TempDir {
    let dir = tempdir().unwrap();
    for (seed, name) in names.iter().enumerate() {
        put(dir.path(), name, content(picture(30, 21, seed as u32), ImageFormat::Png));
    }
    dir
}

// Single pictures.

#[test]
fn a_picture_alone_is_the_image_of_its_folder() {
    for channels in [Channels::Grey, Channels::Rgb, Channels::Rgba, Channels::Auto] {
        let config = FolderConfig { channels, ..config() };
        let folder = Folder::open(FIXTURES, config.clone()).unwrap();
        for (index, path) in paths(&folder).iter().enumerate().step_by(5) {
            let alone = read_picture(Path::new(FIXTURES).join(path), &config);
            let alone = alone.unwrap();
            // The channels of `Auto` are those of this picture.
            if channels != Channels::Auto {
                assert_eq!(alone.shape(), folder.shape(), "{path}");
                let mut pixels = vec![0; alone.pixels().len()];
                folder.read(index, &mut pixels).unwrap();
                assert_eq!(alone.pixels(), pixels, "{path}");
            }
        }
    }
    let dir = tempdir().unwrap();
    put(dir.path(), "a.png", "no picture");
    let error = read_picture(dir.path().join("a.png"), &config()).unwrap_err().to_string();
    assert!(error.contains("a.png: ") && error.contains("none of PNG"), "{error}");
    let grey = DynamicImage::new_luma8(3, 3);
    put(dir.path(), "grey.png", content(grey, ImageFormat::Png));
    let auto = FolderConfig { channels: Channels::Auto, ..config() };
    assert_eq!(read_picture(dir.path().join("grey.png"), &auto).unwrap().shape().channels, 1);
}

#[test]
fn a_mask_is_white_from_128_and_has_the_size_of_the_images() {
    let dir = tempdir().unwrap();
    let grey = image::GrayImage::from_raw(3, 2, vec![0, 127, 128, 255, 200, 1]).unwrap();
    put(dir.path(), "grey.png", content(grey, ImageFormat::Png));
    let white = [false, false, true, true, true, false];
    assert_eq!(read_mask(dir.path().join("grey.png"), 2, 3).unwrap(), white);
    // Luma 149.7 and 76.2.
    let colour = RgbImage::from_raw(2, 1, vec![0, 255, 0, 255, 0, 0]).unwrap();
    put(dir.path(), "colour.png", content(colour, ImageFormat::Png));
    assert_eq!(read_mask(dir.path().join("colour.png"), 1, 2).unwrap(), [true, false]);
    let clear = image::RgbaImage::from_raw(2, 1, vec![255, 255, 255, 100, 255, 255, 255, 200]);
    put(dir.path(), "clear.png", content(clear.unwrap(), ImageFormat::Png));
    assert_eq!(read_mask(dir.path().join("clear.png"), 1, 2).unwrap(), [false, true]);
    let error = read_mask(dir.path().join("grey.png"), 3, 2).unwrap_err().to_string();
    assert!(
        error.ends_with("grey.png: 2 x 3 pixels (height x width); a mask has 3 x 2"),
        "{error}"
    );
}

// Values.

#[test]
fn every_format_has_the_values_of_pillow() {
    let expected = candle_core::safetensors::load(
        Path::new(FIXTURES).join("expected.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    let blue = [0, 40, 200];
    let mut worst: BTreeMap<(String, &str), u8> = BTreeMap::new();
    let mut compared = 0;
    for (case, config) in [
        ("rgb", config()),
        ("lanczos", FolderConfig { filter: Filter::Lanczos, ..config() }),
        ("grey", FolderConfig { channels: Channels::Grey, ..config() }),
        ("rgba", FolderConfig { channels: Channels::Rgba, ..config() }),
        ("blue", FolderConfig { background: blue, ..config() }),
    ] {
        let folder = Folder::open(FIXTURES, config).unwrap();
        for (index, path) in paths(&folder).iter().enumerate() {
            let Some(image) = expected.get(&format!("{path}.{case}")) else { continue };
            let ImageShape { channels, height, width } = folder.shape();
            assert_eq!(image.dims(), [channels, height, width]);
            let image = image.flatten_all().unwrap().to_vec1::<u8>().unwrap();
            let found = read(&folder, index);
            let alpha = |k: usize| match case {
                "rgba" => f64::from(image[3 * height * width + k % (height * width)]) / 255.0,
                _ => 1.0,
            };
            // The colour of an almost transparent pixel has few exact bits.
            let off = found.iter().zip(&image).enumerate();
            let off = off.map(|(k, (a, b))| (f64::from(a.abs_diff(*b)) * alpha(k)).round() as u8);
            let off = off.max().unwrap();
            let extension = path.rsplit('.').next().unwrap().to_string();
            let worst = worst.entry((extension, case)).or_default();
            *worst = off.max(*worst);
            compared += 1;
        }
    }
    assert_eq!(compared, expected.len());
    for ((extension, case), off) in worst {
        // Decoders of JPEG round differently: the inverse transform is not exact.
        let most = if extension == "jpg" { 3 } else { 1 };
        assert!(off <= most, "{extension}, {case}: {off}");
    }
}

#[test]
fn a_picture_of_the_size_of_the_images_is_not_changed() {
    let dir = tempdir().unwrap();
    let image = picture(20, 14, 3);
    put(dir.path(), "a.png", content(image.clone(), ImageFormat::Png));
    for crop in [Crop::Centre, Crop::Random { zoom: 1.0 }] {
        let folder = Folder::open(dir.path(), FolderConfig { crop, ..config() }).unwrap();
        let planes: Vec<u8> =
            (0..3).flat_map(|c| image.pixels().map(move |pixel| pixel.0[c])).collect();
        assert_eq!(read(&folder, 0), planes);
    }
}

#[test]
fn channels_are_grey_only_if_no_picture_has_colours() {
    let dir = tempdir().unwrap();
    put(dir.path(), "a.png", content(GrayImage::new(4, 4), ImageFormat::Png));
    let auto = FolderConfig { channels: Channels::Auto, ..config() };
    let channels = || Folder::open(dir.path(), auto.clone()).unwrap().shape().channels;
    assert_eq!(channels(), 1);
    put(dir.path(), "b.png", content(RgbImage::new(4, 4), ImageFormat::Png));
    assert_eq!(channels(), 3);
}

// Files.

#[test]
fn pictures_are_found_by_their_content_and_sorted_by_the_bytes_of_their_paths() {
    let dir = tempdir().unwrap();
    let png = || content(picture(9, 9, 0), ImageFormat::Png);
    for name in
        ["b.png", "a/z.PNG", "a.png", "a/ü/日本 1.png", "a/.hidden.png", ".dir/x.png", "bare"]
    {
        put(dir.path(), name, png());
    }
    put(dir.path(), "jpeg.png", content(picture(9, 9, 0), ImageFormat::Jpeg));
    put(dir.path(), "a/bitmap.bmp", content(picture(9, 9, 0), ImageFormat::Bmp));
    put(dir.path(), "notes.txt", "notes");
    put(dir.path(), "BMW.txt", "BMW, a text");
    put(dir.path(), "empty.txt", "");
    let folder = Folder::open(dir.path(), config()).unwrap();
    let expected =
        ["a.png", "a/bitmap.bmp", "a/z.PNG", "a/ü/日本 1.png", "b.png", "bare", "jpeg.png"];
    assert_eq!(paths(&folder), expected);
    assert_eq!((folder.ignored(), folder.unreadable()), (3, &[][..]));
}

#[test]
fn a_folder_without_pictures_is_an_error_with_their_extensions() {
    let dir = tempdir().unwrap();
    put(dir.path(), "notes.txt", "notes");
    let found = message(Folder::open(dir.path(), config()));
    assert!(found.contains(": no pictures here; their names end in .png, "), "{found}");
    assert!(found.contains(".jpg, ") && found.ends_with(".tif, .tiff"), "{found}");
    let missing = Folder::open(dir.path().join("missing"), config());
    assert!(matches!(missing, Err(Error::Io { .. })));
    let file = Folder::open(dir.path().join("notes.txt"), config());
    assert!(matches!(file, Err(Error::Io { .. })));
}

#[test]
fn classes_are_the_sub_folders_in_the_order_of_their_names() {
    let dir = folder_of(&["zoo/a.png", "ant/deep/b.png", "ant/c.png", "Bee/d.png"]);
    fs::create_dir(dir.path().join("none")).unwrap();
    let classes = FolderConfig { classes: true, ..skipping() };
    let folder = Folder::open(dir.path(), classes.clone()).unwrap();
    assert_eq!(
        (folder.class_names(), folder.classes()),
        (&["Bee", "ant", "zoo"].map(String::from)[..], 3)
    );
    let mut pixels = vec![0; 3 * 14 * 20];
    let found = (0..4).map(|k| folder.read(k, &mut pixels).unwrap()).collect::<Vec<_>>();
    assert_eq!(paths(&folder), ["Bee/d.png", "ant/c.png", "ant/deep/b.png", "zoo/a.png"]);
    assert_eq!(found, [Some(0), Some(1), Some(1), Some(2)]);
    // An unreadable picture does not change the numbers of the classes.
    put(dir.path(), "Bee/d.png", b"\x89PNG\r\n\x1a\n");
    let folder = Folder::open(dir.path(), classes.clone()).unwrap();
    assert_eq!(folder.read(0, &mut pixels).unwrap(), Some(1));

    put(dir.path(), "lost.png", content(picture(9, 9, 0), ImageFormat::Png));
    let found = message(Folder::open(dir.path(), classes));
    assert!(found.contains("lost.png: in no sub-folder, so it has no class"), "{found}");
    let folder = Folder::open(dir.path(), skipping()).unwrap();
    assert_eq!((folder.classes(), folder.read(0, &mut pixels).unwrap()), (0, None));
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_loops_of_links_end() {
    use std::os::unix::fs::symlink;

    let dir = folder_of(&["zoo/a.png", "zoo/b.png"]);
    let other = folder_of(&["deep/c.png"]);
    let root = dir.path();
    symlink(root, root.join("zoo/loop")).unwrap();
    // Its name is before the folder's, whose pictures have the path without links.
    symlink("zoo", root.join("ant")).unwrap();
    symlink(other.path(), root.join("more")).unwrap();
    symlink("self.txt", root.join("self.txt")).unwrap();
    // Folders that lead to each other: without a list of visited ones, 2^40 paths.
    for k in 0..40 {
        fs::create_dir(root.join(format!("d{k}"))).unwrap();
        for name in ["x", "y"] {
            symlink(root.join(format!("d{}", k + 1)), root.join(format!("d{k}/{name}"))).unwrap();
        }
    }
    let folder = Folder::open(root, config()).unwrap();
    assert_eq!(paths(&folder), ["more/deep/c.png", "zoo/a.png", "zoo/b.png"]);

    symlink("nowhere.png", root.join("zoo/dead.png")).unwrap();
    let folder = Folder::open(root, skipping()).unwrap();
    let [(path, reason)] = &unreadable(&folder)[..] else { panic!("{folder:?}") };
    assert!(path == "zoo/dead.png" && reason.contains("No such file"), "{path}: {reason}");
}

#[test]
fn broken_pictures_are_refused_or_skipped_by_name() {
    let dir = tempdir().unwrap();
    let mut broken = Vec::new();
    for name in [
        "reduced.png",
        "full.jpg",
        "progressive.jpg",
        "animated.gif",
        "wide.bmp",
        "high.tiff",
        "enlarged.webp",
        "rgba16.png",
    ] {
        let whole = fs::read(Path::new(FIXTURES).join(name)).unwrap();
        // The first frame of the animation is whole in its first half.
        let half = if name == "animated.gif" { whole.len() / 4 } else { whole.len() / 2 };
        put(dir.path(), &format!("half-{name}"), &whole[..half]);
        put(dir.path(), &format!("start-{name}"), &whole[..12]);
        broken.extend([format!("half-{name}"), format!("start-{name}")]);
    }
    // Compressed data that is complete except for the end marker, which Pillow refuses, too.
    let jpeg = fs::read(Path::new(FIXTURES).join("full.jpg")).unwrap();
    put(dir.path(), "no-end.jpg", &jpeg[..jpeg.len() - 2]);
    put(dir.path(), "empty.png", "");
    put(dir.path(), "text.jpeg", "no picture");
    broken.extend(["no-end.jpg", "empty.png", "text.jpeg"].map(String::from));
    // Something after the end does not matter. Some cameras append a second picture.
    put(dir.path(), "whole.jpg", [&jpeg[..], b"\xff\xda more", &jpeg[..40]].concat());
    broken.sort();

    let folder = Folder::open(dir.path(), skipping()).unwrap();
    assert_eq!(paths(&folder), ["whole.jpg"]);
    let found = unreadable(&folder);
    assert_eq!(found.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>(), broken);
    for (path, reason) in &found {
        assert!(!reason.is_empty() && !reason.contains('\n'), "{path}: {reason}");
        let expected = match &**path {
            "empty.png" => "an empty file",
            "text.jpeg" => "its content is none of PNG, JPEG, WebP, GIF, BMP, TIFF",
            "no-end.jpg" | "half-full.jpg" | "half-progressive.jpg" => {
                "truncated: it has no end-of-image marker"
            }
            _ => continue,
        };
        assert_eq!(*reason, expected, "{path}");
    }

    let refused = message(Folder::open(dir.path(), config()));
    assert!(refused.contains(": 19 of 20 pictures cannot be read: empty.png (an empty file), "));
    assert!(refused.ends_with(" and 14 more; Unreadable::Skip leaves them out"), "{refused}");
    fs::remove_file(dir.path().join("whole.jpg")).unwrap();
    let none = message(Folder::open(dir.path(), skipping()));
    assert!(none.contains(": no picture here can be read: empty.png (an empty file), "), "{none}");
}

// Hostile files.

/// The system's allocator, which counts what the current thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: every block comes from `System` and returns to it with the same layout. The counters are
// thread-local cells without destructors, which allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.get() + layout.size() as isize;
        HELD.set(held);
        PEAK.set(PEAK.get().max(held));
        // SAFETY: the caller guarantees the requirements on `layout`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        // SAFETY: `block` is from `System.alloc` with this layout.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `f` where rayon's pool has this number of threads. With one thread, everything runs on it.
fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

fn png_chunk(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(name);
    crc.update(content);
    let len = (content.len() as u32).to_be_bytes();
    [&len[..], name, content, &crc.sum().to_be_bytes()].concat()
}

fn png(width: u32, height: u32, chunks: &[Vec<u8>]) -> Vec<u8> {
    let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
    let header = png_chunk(b"IHDR", &[&size[..], &[16, 6, 0, 0, 0]].concat());
    [b"\x89PNG\r\n\x1a\n".to_vec(), header, chunks.concat(), png_chunk(b"IEND", &[])].concat()
}

fn zeros(len: usize) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&vec![0; len]).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn no_claim_of_a_file_allocates_more_than_the_limit() {
    let bomb = zeros(64 << 20);
    let le = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    let (side, most) = (65_535u16, u32::MAX >> 1);
    let mut jpeg = content(picture(8, 8, 0), ImageFormat::Jpeg);
    let frame = jpeg.windows(2).position(|bytes| bytes == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xff);
    let mut bitmap = content(picture(8, 8, 0), ImageFormat::Bmp);
    bitmap[18..26].copy_from_slice(&le(&[most, most]));
    let mut gif = content(picture(8, 8, 0), ImageFormat::Gif);
    gif[6..10].fill(0xff);
    // Width and height in the first entries of the directory.
    let mut tiff = content(picture(8, 8, 0), ImageFormat::Tiff);
    let directory = u32::from_le_bytes(tiff[4..8].try_into().unwrap()) as usize;
    for entry in 0..2 {
        let at = directory + 2 + 12 * entry;
        tiff[at + 2..at + 4].copy_from_slice(&4u16.to_le_bytes());
        tiff[at + 8..at + 12].copy_from_slice(&le(&[most]));
    }
    // An extended WebP file of 2^24 x 2^24 pixels.
    let webp = [&b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0"[..], &[0, 0, 0, 0], &[0xff; 6]].concat();
    let profile = [&b"name\0\0"[..], &bomb].concat();
    let text = [&b"Comment\0\0"[..], &bomb].concat();
    let data = || png_chunk(b"IDAT", &zeros(100));
    let files = [
        ("large.png", png(most, most, &[data()])),
        ("row.png", png(most, 1, &[data()])),
        ("square.png", png(side.into(), side.into(), &[data()])),
        ("data-bomb.png", png(2, 2, &[png_chunk(b"IDAT", &bomb)])),
        ("profile-bomb.png", png(2, 2, &[png_chunk(b"iCCP", &profile), data()])),
        ("text-bomb.png", png(2, 2, &[png_chunk(b"zTXt", &text), data()])),
        ("large.jpg", jpeg),
        ("large.bmp", bitmap),
        ("large.gif", gif),
        ("large.tiff", tiff),
        ("large.webp", webp),
    ];
    let limited = FolderConfig { max_pixels: 1 << 16, ..skipping() };
    for (name, content) in files {
        let dir = tempdir().unwrap();
        put(dir.path(), name, &content);
        let (opened, peak) = with_threads(1, || {
            let before = HELD.get();
            PEAK.set(before);
            (Folder::open(dir.path(), limited.clone()), PEAK.get() - before)
        });
        let refused = message(opened).contains(name);
        assert_eq!(refused, !name.ends_with("bomb.png"), "{name}");
        // The limit of the folder's documentation, and buffers of the decoders.
        assert!(peak < 24 << 16, "{name}: {peak} bytes");
    }
    let dir = tempdir().unwrap();
    put(dir.path(), "a.png", png(side.into(), side.into(), &[data()]));
    let found = message(Folder::open(dir.path(), config()));
    assert!(found.contains("a.png (65535 x 65535 pixels; max_pixels is 134217728)"), "{found}");
    // A file is not read if it is larger than any picture within the limit.
    let file = fs::File::create(dir.path().join("a.png")).unwrap();
    file.set_len(1 << 40).unwrap();
    (&file).write_all(b"\x89PNG\r\n\x1a\n").unwrap();
    let found = message(Folder::open(dir.path(), config()));
    assert!(found.contains("a.png (more than 1074790400 bytes, the most of"), "{found}");
}

#[test]
fn no_damage_of_a_picture_is_a_panic() {
    let dir = tempdir().unwrap();
    let mut random = 1u64;
    let mut next = |below: usize| {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    for entry in fs::read_dir(FIXTURES).unwrap() {
        let (entry, mut count) = (entry.unwrap(), 0);
        while entry.path().extension().is_some_and(|e| e != "safetensors") && count < 12 {
            let mut bytes = fs::read(entry.path()).unwrap();
            for _ in 0..1 + next(8) {
                let at = 8 + next(bytes.len() - 8);
                bytes[at] = next(256) as u8;
            }
            put(dir.path(), &format!("{count}-{}", entry.file_name().display()), bytes);
            count += 1;
        }
    }
    let folder = Folder::open(dir.path(), FolderConfig { max_pixels: 1 << 20, ..skipping() });
    let folder = folder.unwrap();
    let found = (folder.len(), folder.unreadable().len());
    assert!(found.0 > 50 && found.1 > 50, "{found:?}");
}

// Random crops.

/// Pictures whose red is the column, and whose green is the row.
fn ramps(width: u32, height: u32) -> TempDir {
    let dir = tempdir().unwrap();
    let image = RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, 0]));
    put(dir.path(), "a.png", content(image, ImageFormat::Png));
    dir
}

fn drawn(folder: &Folder, random: u64) -> Vec<u8> {
    let mut pixels = vec![0; folder.shape().values().unwrap()];
    folder.read_augmented(0, random, &mut pixels).unwrap();
    pixels
}

#[test]
fn random_crops_are_windows_at_uniformly_distributed_places() {
    // The pictures have the height of the images, or the width, so that nothing is scaled.
    for (width, height) in [(29, 14), (20, 23)] {
        let dir = ramps(width, height);
        let random = FolderConfig { crop: Crop::Random { zoom: 1.0 }, ..config() };
        let folder = Folder::open(dir.path(), random).unwrap();
        let mut counts = [0; 10];
        for k in 0..4000 {
            let pixels = drawn(&folder, k);
            let (x, y) = (pixels[0], pixels[280]);
            let window = |c: usize, k: usize| [x + (k % 20) as u8, y + (k / 20) as u8, 0][c];
            let expected = (0..3).flat_map(|c| (0..280).map(move |k| window(c, k)));
            assert!(expected.eq(pixels.iter().copied()), "{x}, {y}");
            counts[usize::from(x + y)] += 1;
        }
        // A binomial distribution: 400 with a standard deviation of 19.
        assert!(counts.iter().all(|count| (310..490).contains(count)), "{counts:?}");
    }
}

#[test]
fn random_crops_are_as_large_as_the_zoom_allows_and_lie_within_the_picture() {
    let dir = ramps(160, 120);
    let zoom = 2.0;
    let random = FolderConfig { height: 30, width: 40, crop: Crop::Random { zoom }, ..config() };
    let folder = Folder::open(dir.path(), random).unwrap();
    let (mut sizes, mut places) = (Vec::new(), Vec::new());
    for k in 0..500 {
        let pixels = drawn(&folder, k);
        assert_eq!(pixels, drawn(&folder, k));
        // A column of the image is `step` columns of the picture, which is half as large when it covers the zoom.
        let (first, last) = (f64::from(pixels[5]), f64::from(pixels[34]));
        let step = (last - first) / 29.0;
        sizes.push(step / 2.0);
        places.push(first);
    }
    let range = |values: &[f64]| {
        let bound = |f: fn(f64, f64) -> f64| values.iter().copied().reduce(f).unwrap();
        (bound(f64::min), bound(f64::max))
    };
    let (least, most) = range(&sizes);
    assert!((0.98..1.03).contains(&least) && (1.95..2.02).contains(&most), "{least} {most}");
    let mean = sizes.iter().sum::<f64>() / 500.0;
    assert!((1.45..1.55).contains(&mean), "{mean}");
    let (first, last) = range(&places);
    assert!(first < 25.0 && last > 75.0, "{first} {last}");
    // The centre is that of the whole picture: rows and columns that are symmetric.
    let centre = read(&folder, 0);
    assert!(centre[0].abs_diff(159 - centre[39]) <= 1, "{centre:?}");
}

#[test]
fn long_pictures_are_refused_before_their_scaled_form_is_allocated() {
    let dir = tempdir().unwrap();
    put(dir.path(), "a.png", content(RgbImage::new(1, 2000), ImageFormat::Png));
    let random = Crop::Random { zoom: 1.0 };
    let long = FolderConfig { crop: random, max_pixels: 1 << 16, ..config() };
    let found = message(Folder::open(dir.path(), long));
    assert!(found.contains("1 x 2000 pixels, scaled 20 x 40000; max_pixels is 65536"), "{found}");
}

// Memory and the cache.

const NAMES: [&str; 6] = ["a.png", "b.png", "c.png", "d/e.png", "f.png", "g.png"];

#[test]
fn pictures_beyond_the_limit_of_memory_are_decoded_again_with_the_same_values() {
    let dir = folder_of(&NAMES);
    for crop in [Crop::Centre, Crop::Random { zoom: 1.5 }] {
        let open = |limit| {
            let config = FolderConfig { crop, ..config() };
            Folder::builder(dir.path(), config).memory_limit(limit).open().unwrap()
        };
        let one = match crop {
            Crop::Centre => 3 * 14 * 20,
            _ => 3 * 21 * 30,
        };
        let whole = open(6 * one);
        assert_eq!((whole.in_memory(), whole.threads()), (6, 1));
        for (limit, kept) in [(0, 0), (6 * one - 1, 5), (2 * one, 2)] {
            let folder = with_threads(3, || open(limit));
            assert_eq!((folder.in_memory(), folder.threads()), (kept, 3));
            assert_eq!(all(&folder), all(&whole));
            assert_eq!(drawn(&folder, 5), drawn(&whole, 5));
        }
    }
}

#[test]
fn a_picture_that_changes_while_it_is_used_is_an_error() {
    let dir = folder_of(&NAMES);
    let folder = Folder::builder(dir.path(), config()).memory_limit(0).open().unwrap();
    let mut pixels = vec![0; 3 * 14 * 20];
    put(dir.path(), "b.png", content(picture(30, 21, 99), ImageFormat::Png));
    fs::remove_file(dir.path().join("c.png")).unwrap();
    folder.read(0, &mut pixels).unwrap();
    for (index, expected) in [(1, "b.png: changed since the folder was opened"), (2, "c.png: ")] {
        let found = folder.read(index, &mut pixels).unwrap_err().to_string();
        assert!(found.contains(expected), "{found}");
    }
    for (index, len) in [(6, 840), (0, 839)] {
        let error = folder.read(index, &mut vec![0; len]).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error}");
    }
}

fn entries(cache: &Path) -> BTreeSet<std::path::PathBuf> {
    fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_cache_keeps_scaled_pictures_by_content_and_settings() {
    let (dir, cache) = (folder_of(&NAMES), tempdir().unwrap());
    let cache = cache.path().join("new/cache");
    let open = |config: FolderConfig| {
        Folder::builder(dir.path(), config).memory_limit(0).cache(&cache).open().unwrap()
    };
    let expected = all(&Folder::open(dir.path(), config()).unwrap());
    assert_eq!(all(&open(config())), expected);
    let six = entries(&cache);
    assert_eq!(six.len(), 6);

    // The file of one picture in the place of another's shows that the files are used.
    let of = |name: &str| {
        let (other, cache) = (tempdir().unwrap(), tempdir().unwrap());
        fs::copy(dir.path().join(name), other.path().join("x.png")).unwrap();
        Folder::builder(other.path(), config()).cache(cache.path()).open().unwrap();
        let entry = entries(cache.path()).pop_first().unwrap();
        (entry.file_name().unwrap().to_owned(), fs::read(entry).unwrap())
    };
    let ((a, content_a), (_, content_b)) = (of("a.png"), of("b.png"));
    assert_eq!(fs::read(cache.join(&a)).unwrap(), content_a);
    fs::write(cache.join(&a), &content_b).unwrap();
    let folder = open(config());
    assert_eq!(read(&folder, 0), expected[1]);

    // Damage is detected, whether the folder is being opened or in use, and the file is made again.
    let damages: [fn(&mut Vec<u8>); 5] = [
        |bytes| bytes[100] ^= 1,
        |bytes| bytes.truncate(400),
        |bytes| bytes.clear(),
        |bytes| bytes.push(0),
        // The wrong size with the right checksum.
        |bytes| {
            bytes[12..20].copy_from_slice(&[14, 0, 0, 0, 20, 0, 0, 0]);
            let mut crc = flate2::Crc::new();
            crc.update(&bytes[12..]);
            bytes[8..12].copy_from_slice(&crc.sum().to_le_bytes());
        },
    ];
    for damage in damages {
        for in_use in [false, true] {
            let folder = open(config());
            let mut damaged = content_a.clone();
            damage(&mut damaged);
            fs::write(cache.join(&a), damaged).unwrap();
            let folder = if in_use { folder } else { open(config()) };
            assert_eq!(all(&folder), expected);
            assert_eq!(fs::read(cache.join(&a)).unwrap(), content_a);
        }
    }
    assert_eq!(entries(&cache), six);

    // Each setting that changes the pixels makes other files, and so does another content.
    let others = [
        FolderConfig { height: 15, ..config() },
        FolderConfig { width: 15, ..config() },
        FolderConfig { channels: Channels::Grey, ..config() },
        FolderConfig { background: [0; 3], ..config() },
        FolderConfig { crop: Crop::Random { zoom: 1.0 }, ..config() },
        FolderConfig { filter: Filter::Lanczos, ..config() },
    ];
    for (k, other) in others.into_iter().enumerate() {
        open(other);
        assert_eq!(entries(&cache).len(), 12 + 6 * k);
    }
    put(dir.path(), "b.png", content(picture(30, 21, 99), ImageFormat::Png));
    open(config());
    assert_eq!(entries(&cache).len(), 43);

    let blocked = dir.path().join("a.png");
    let found = message(Folder::builder(dir.path(), config()).cache(blocked).open());
    assert!(found.contains("a.png"), "{found}");
}

#[test]
fn the_limit_of_pixels_holds_with_a_cache() {
    let (dir, cache) = (folder_of(&["large.png"]), tempdir().unwrap());
    put(dir.path(), "small.png", content(picture(20, 14, 1), ImageFormat::Png));
    // 30 x 21 and 20 x 14 pixels.
    for (max_pixels, expected) in [
        (630, &["large.png", "small.png"][..]),
        (629, &["small.png"]),
        (630, &["large.png", "small.png"]),
    ] {
        let config = FolderConfig { max_pixels, ..skipping() };
        let folder = Folder::builder(dir.path(), config.clone()).cache(cache.path()).open();
        assert_eq!(paths(&folder.unwrap()), expected);
        assert_eq!(paths(&Folder::open(dir.path(), config).unwrap()), expected);
    }
}

// Progress.

#[test]
fn progress_counts_every_file_of_each_stage() {
    let dir = folder_of(&NAMES);
    put(dir.path(), "notes.txt", "notes");
    let seen = Mutex::new(Vec::new());
    let builder = Folder::builder(dir.path(), config()).on_progress(|progress: Progress| {
        seen.lock().unwrap().push(progress);
        ControlFlow::Continue(())
    });
    builder.open().unwrap();
    let seen = seen.into_inner().unwrap();
    for (stage, total) in [(Stage::Checking, 7), (Stage::Decoding, 6)] {
        let mut done: Vec<_> =
            seen.iter().filter(|p| p.stage == stage && p.total == total).map(|p| p.done).collect();
        done.sort();
        assert_eq!(done, (1..=total).collect::<Vec<_>>());
    }
    let found: Vec<_> = seen.iter().filter(|p| p.stage == Stage::Finding).map(|p| p.done).collect();
    assert_eq!(found.last(), Some(&7));
    assert_eq!(seen.last().unwrap().to_string(), "decoding pictures: 6 of 6");
}

#[test]
fn opening_stops_at_every_stage() {
    let dir = folder_of(&NAMES);
    for stage in [Stage::Finding, Stage::Checking, Stage::Decoding] {
        let mut calls = 0;
        let builder = Folder::builder(dir.path(), config()).on_progress(|progress| {
            calls += usize::from(progress.stage == stage);
            match progress.stage == stage {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        let stopped = with_threads(1, || builder.open());
        assert!(matches!(stopped, Err(Error::Stopped { .. })), "{stopped:?}");
        assert_eq!(calls, 1);
    }
}

// The configuration.

#[test]
fn a_configuration_is_the_same_after_json_and_missing_fields_are_defaults() {
    let config = FolderConfig {
        crop: Crop::Random { zoom: 1.25 },
        channels: Channels::Rgba,
        filter: Filter::Lanczos,
        unreadable: Unreadable::Skip,
        background: [1, 2, 3],
        classes: true,
        ..FolderConfig::default()
    };
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<FolderConfig>(&json).unwrap(), config);
    assert!(json.contains(r#""crop":{"random":{"zoom":1.25}}"#), "{json}");
    assert_eq!(serde_json::from_str::<FolderConfig>("{}").unwrap(), FolderConfig::default());
    assert!(serde_json::from_str::<FolderConfig>(r#"{"hight":3}"#).is_err());
}

#[test]
fn configurations_without_a_meaning_are_refused_by_field() {
    let dir = folder_of(&["a.png"]);
    for (config, expected) in [
        (FolderConfig { height: 0, ..config() }, "height is 0; it must be at least 1"),
        (FolderConfig { width: 0, ..config() }, "width is 0; it must be at least 1"),
        (FolderConfig { max_pixels: 0, ..config() }, "max_pixels is 0; it must be at least 1"),
        (FolderConfig { crop: Crop::Random { zoom: 0.5 }, ..config() }, "zoom is 0.5; it must be"),
        (FolderConfig { crop: Crop::Random { zoom: f64::NAN }, ..config() }, "zoom is NaN"),
        (FolderConfig { max_pixels: 279, ..config() }, "height x width is 14 x 20; it must be"),
        (FolderConfig { height: u32::MAX, width: u32::MAX, ..config() }, "height x width is 4294"),
    ] {
        let found = message(Folder::open(dir.path(), config));
        assert!(found.starts_with(expected), "{found}");
    }
}

// Training.

fn trainer(steps: u64) -> Trainer<Scale> {
    let config =
        TrainConfig { steps, batch_size: 4, horizontal_flip: true, ..TrainConfig::mnist() };
    Trainer::new(Scale, config, Diffusion::ddpm(), &Device::Cpu).unwrap()
}

fn random_crops(dir: &Path, threads: usize, memory: u64) -> Folder {
    let config = FolderConfig { crop: Crop::Random { zoom: 1.5 }, ..config() };
    with_threads(threads, || Folder::builder(dir, config).memory_limit(memory).open().unwrap())
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn batches_are_the_same_for_any_number_of_threads_and_any_memory() {
    let dir = folder_of(&NAMES);
    let batches = |folder: &Folder| -> Vec<Vec<f32>> {
        let mut trainer = trainer(5);
        let mut next = |_| {
            let batch = trainer.next_batch(folder).unwrap();
            trainer.step(&batch).unwrap();
            values(&batch.images)
        };
        (0..5).map(&mut next).collect()
    };
    let expected = batches(&random_crops(dir.path(), 1, 1 << 20));
    // Crops differ from update to update, and are not those around the centre.
    let images: BTreeSet<Vec<u32>> = expected
        .iter()
        .flat_map(|batch| {
            batch.chunks(840).map(|image| image.iter().map(|v| v.to_bits()).collect())
        })
        .collect();
    assert!(images.len() > 17, "{} of 20 images differ", images.len());
    for (threads, memory) in [(1, 0), (2, 0), (3, 4000), (8, 0)] {
        assert_eq!(batches(&random_crops(dir.path(), threads, memory)), expected, "{threads}");
    }
}

#[test]
fn a_resumed_run_with_random_crops_is_the_unbroken_run() {
    let (dir, temp) = (folder_of(&NAMES), tempdir().unwrap());
    let checkpoint = temp.path().join("checkpoint");
    let folder = |memory| random_crops(dir.path(), 3, memory);
    let weight =
        |trainer: &Trainer<Scale>| values(trainer.vars()["scale"].as_tensor())[0].to_bits();

    let mut unbroken = trainer(9);
    unbroken.fit(&folder(1 << 20), ()).unwrap();
    let mut first = trainer(4);
    first.fit(&folder(0), ()).unwrap();
    first.save(&checkpoint).unwrap();
    let config = trainer(9).config().clone();
    let mut second =
        Trainer::resume(&checkpoint, Scale, config, Diffusion::ddpm(), &Device::Cpu).unwrap();
    assert_ne!(weight(&second), weight(&unbroken));
    second.fit(&folder(0), ()).unwrap();
    assert_eq!(weight(&second), weight(&unbroken));
    // The crops have an effect on the weight.
    let mut centred = trainer(9);
    centred.fit(&Folder::open(dir.path(), self::config()).unwrap(), ()).unwrap();
    assert_ne!(weight(&centred), weight(&unbroken));
}
