//! The readers of data files: their results, their errors, and their use of memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Debug;
use std::fs;
use std::io::Write;
use std::path::Path;

use ddpm::Error;
use ddpm::data::{Dataset, Images};
use ddpm::data::{ImageShape, normalized};
use ddpm::data::{Split, cifar10, mnist, read_idx_images, read_idx_labels};
use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use proptest::sample::Index;
use tempfile::TempDir;

#[path = "../src/random_inputs.rs"]
mod random_inputs;
use random_inputs::inputs;

/// The system's allocator, which counts what the current thread allocates.
///
/// Growing a block counts as a second block beside the first (the default `realloc` of the trait).
/// This is the worst case.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every block comes from `System` and returns to it with the same layout. The counters are
// thread-local cells without destructors, which allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.get() + layout.size() as isize;
        HELD.set(held);
        PEAK.set(PEAK.get().max(held));
        LARGEST.set(LARGEST.get().max(layout.size()));
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

struct Usage {
    /// Maximum number of bytes held at once, in addition to those held before.
    peak: usize,
    /// The largest single block.
    largest: usize,
}

fn measured<T>(f: impl FnOnce() -> T) -> (T, Usage) {
    let before = HELD.get();
    PEAK.set(before);
    LARGEST.set(0);
    let result = f();
    (result, Usage { peak: (PEAK.get() - before) as usize, largest: LARGEST.get() })
}

/// A gzip decoder's window and buffers are 100 KiB.
const LITTLE: usize = 256 << 10;

/// The magic numbers of IDX images and labels.
const I: u32 = 0x0803;
const L: u32 = 0x0801;
const MAX: u32 = u32::MAX;

fn idx(header: &[u32], content: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<_> = header.iter().flat_map(|word| word.to_be_bytes()).collect();
    bytes.extend(content);
    bytes
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn cut(bytes: &[u8], by: usize) -> Vec<u8> {
    bytes[..bytes.len() - by].to_vec()
}

fn flip(mut bytes: Vec<u8>, from_end: usize) -> Vec<u8> {
    let at = bytes.len() - from_end;
    bytes[at] ^= 0x55;
    bytes
}

/// Bytes without a pattern, so that a misplaced pixel is detected.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn shape(channels: usize, height: usize, width: usize) -> ImageShape {
    ImageShape { channels, height, width }
}

fn record(label: u8) -> Vec<u8> {
    [vec![label], noise(3072)].concat()
}

/// Asserts that `read` fails on `path` with a message that contains `says`, and allocates little
/// memory.
fn refused<T: Debug>(case: &str, path: &Path, says: &str, read: impl FnOnce() -> ddpm::Result<T>) {
    let (result, usage) = measured(read);
    let error = result.expect_err(case);
    assert!(matches!(error, Error::Data { .. } | Error::Io { .. }), "{case}: {error:?}");
    let text = error.to_string();
    assert!(text.starts_with(&format!("{}: ", path.display())), "{case}: {text}");
    assert!(text.contains(says), "{case}: {text:?} does not say {says:?}");
    assert!(usage.largest <= LITTLE, "{case} allocated {} bytes at once", usage.largest);
}

#[test]
fn bad_image_files_are_refused() {
    let good = idx(&[I, 2, 3, 4], &noise(24));
    let longer = [&good[..], &[0]].concat();
    let zeros = vec![0; 64 << 20];
    let cases = [
        ("empty", vec![], "0 bytes; the header of IDX images has 16"),
        ("one byte", vec![0], "1 bytes; the header of IDX images has 16"),
        ("short header", good[..15].to_vec(), "15 bytes; the header of IDX images has 16"),
        ("only a header", good[..16].to_vec(), "16 bytes; its header says 16 + 2 x 3 x 4 = 40"),
        (
            "labels",
            idx(&[L, 3], &[1, 2, 3]),
            "0x00000801 (IDX labels); IDX images start with 0x00000803",
        ),
        ("short labels", idx(&[L, 1], &[1]), "0x00000801 (IDX labels)"),
        ("16-bit integers", idx(&[0x0b03, 1, 1, 1], &[0, 0]), "0x00000b03 (neither"),
        ("little-endian", idx(&[I.swap_bytes(), 1, 1, 1], &[0]), "0x03080000 (neither"),
        ("a PNG", b"\x89PNG\r\n\x1a\n and so on".to_vec(), "0x89504e47 (neither"),
        ("no images", idx(&[I, 0, 3, 4], &[]), "0 x 3 x 4 bytes; each must be at least 1"),
        ("no rows", idx(&[I, 2, 0, 4], &[]), "2 x 0 x 4 bytes; each must be at least 1"),
        ("no columns", idx(&[I, 2, 3, 0], &[]), "2 x 3 x 0 bytes; each must be at least 1"),
        ("truncated", cut(&good, 1), "39 bytes; its header says 16 + 2 x 3 x 4 = 40"),
        ("trailing", longer.clone(), "more bytes; its header says 16 + 2 x 3 x 4 = 40"),
        ("huge claim", idx(&[I, 4_000_000_000, 1, 1], &[]), "says 16 + 4000000000 x 1 x 1 ="),
        // 2^64 plus the header. In 64 bits this wraps to the header alone, so that 16 bytes would
        // suffice.
        ("wraps", idx(&[I, 1 << 31, 1 << 31, 4], &[]), "16 bytes; its header says 16 + 2147483648"),
        ("overflow", idx(&[I, MAX, MAX, MAX], &[0; 9]), "= 79228162458924105385300197391 bytes"),
        ("gzip magic only", vec![0x1f, 0x8b], "damaged gzip data"),
        ("gzip truncated", cut(&gzip(&good), 12), "damaged gzip data"),
        ("gzip without trailer", cut(&gzip(&good), 8), "damaged gzip data"),
        ("gzip checksum", flip(gzip(&good), 8), "damaged gzip data"),
        ("gzip length", flip(gzip(&good), 1), "damaged gzip data"),
        ("gzip stream", flip(gzip(&good), 20), "damaged gzip data"),
        ("gzip and rubbish", [gzip(&good), vec![7; 20]].concat(), "damaged gzip data"),
        ("gzip of labels", gzip(&idx(&[L, 3], &[1, 2, 3])), "0x00000801 (IDX labels)"),
        ("gzip of nothing", gzip(&[]), "0 bytes; the header of IDX images has 16"),
        ("gzip of too little", gzip(&cut(&good, 1)), "39 bytes; its header says"),
        ("gzip of too much", gzip(&longer), "more bytes; its header says"),
        ("gzip of gzip", gzip(&gzip(&good)), "0x1f8b0800 (neither"),
        ("gzip of a huge claim", gzip(&idx(&[I, MAX, 28, 28], &[1])), "17 bytes; its header says"),
        ("bomb", gzip(&[&good[..], &zeros].concat()), "more bytes; its header says 16 + 2 x 3 x 4"),
        // Reading beyond the first surplus byte would reach the invalid data.
        ("bomb not set off", [gzip(&longer), vec![7; 20]].concat(), "more bytes; its header says"),
        (
            "bomb that claims more",
            gzip(&idx(&[I, MAX, 28, 28], &zeros)),
            "67108880 bytes; its header says",
        ),
    ];
    let dir = TempDir::new().unwrap();
    for (case, bytes, says) in cases {
        let path = dir.path().join(case);
        fs::write(&path, bytes).unwrap();
        refused(case, &path, says, || read_idx_images(&path));
    }
}

#[test]
fn bad_label_files_are_refused() {
    let good = idx(&[L, 3], &[5, 0, 4]);
    let cases = [
        ("empty", vec![], "0 bytes; the header of IDX labels has 8"),
        ("short header", good[..7].to_vec(), "7 bytes; the header of IDX labels has 8"),
        (
            "images",
            idx(&[I, 1, 1, 1], &[0]),
            "0x00000803 (IDX images); IDX labels start with 0x00000801",
        ),
        ("no labels", idx(&[L, 0], &[]), "0 bytes; each must be at least 1"),
        ("truncated", cut(&good, 1), "10 bytes; its header says 8 + 3 = 11"),
        ("trailing", [&good[..], &[0]].concat(), "more bytes; its header says 8 + 3 = 11"),
        ("huge claim", idx(&[L, MAX], &[0; 8]), "16 bytes; its header says 8 + 4294967295"),
        ("gzip of a huge claim", gzip(&idx(&[L, MAX], &[1])), "9 bytes; its header says"),
    ];
    let dir = TempDir::new().unwrap();
    for (case, bytes, says) in cases {
        let path = dir.path().join(case);
        fs::write(&path, bytes).unwrap();
        refused(case, &path, says, || read_idx_labels(&path));
    }
}

#[test]
fn what_is_not_a_file_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("missing");
    refused("missing images", &path, "os error 2", || read_idx_images(&path));
    refused("missing labels", &path, "os error 2", || read_idx_labels(&path));
    refused("a directory", dir.path(), "not a regular file", || read_idx_images(dir.path()));
    refused("no MNIST directory", &path, "os error 2", || mnist(&path, Split::Train));
    refused("no CIFAR-10 directory", &path, "os error 2", || cifar10(&path, Split::Test));
}

#[test]
fn bad_mnist_directories_are_refused() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let read = || mnist(dir.path(), Split::Train);
    let says = "neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz is here";
    refused("empty", dir.path(), says, read);

    fs::write(at("train-images-idx3-ubyte"), idx(&[I, 3, 1, 2], &noise(6))).unwrap();
    let labels = at("train-labels-idx1-ubyte");
    fs::write(&labels, idx(&[L, 2], &[1, 2])).unwrap();
    refused("fewer labels", &labels, "2 labels, for 3 images", read);
    fs::write(&labels, idx(&[L, 4], &[1, 2, 3, 4])).unwrap();
    refused("more labels", &labels, "4 labels, for 3 images", read);

    fs::remove_file(&labels).unwrap();
    fs::create_dir(&labels).unwrap();
    refused("a directory", &labels, "not a regular file", read);

    #[cfg(unix)]
    {
        fs::remove_dir(&labels).unwrap();
        std::os::unix::fs::symlink(at("nowhere"), &labels).unwrap();
        refused("a link to nothing", &labels, "os error 2", read);
    }
}

/// Training does not use the labels.
#[test]
fn mnist_without_a_file_of_labels_has_images_without_labels() {
    let dir = TempDir::new().unwrap();
    let pixels = noise(6);
    for part in ["train", "t10k"] {
        let path = dir.path().join(format!("{part}-images-idx3-ubyte"));
        fs::write(path, idx(&[I, 3, 1, 2], &pixels)).unwrap();
    }
    for split in [Split::Train, Split::Test] {
        let images = mnist(dir.path(), split).unwrap();
        assert_eq!((images.len(), images.shape()), (3, shape(1, 1, 2)));
        assert_eq!((images.pixels(), images.labels()), (&pixels[..], None));
    }
}

#[test]
fn bad_cifar10_directories_are_refused() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let read = || cifar10(dir.path(), Split::Test);
    let batch = at("test_batch.bin");
    refused("missing", &batch, "os error 2", read);
    for (case, bytes, says) in [
        ("empty", vec![], "0 bytes; a CIFAR-10 batch is one or more records of 3073 bytes"),
        ("truncated", cut(&record(1), 1), "3072 bytes; a CIFAR-10 batch"),
        ("trailing", [record(1), vec![0]].concat(), "3074 bytes; a CIFAR-10 batch"),
        ("no labels", noise(3072 * 2), "6144 bytes; a CIFAR-10 batch"),
        ("label", [record(9), record(10)].concat(), "record 1 has label 10; CIFAR-10's are 0 to 9"),
    ] {
        fs::write(&batch, bytes).unwrap();
        refused(case, &batch, says, read);
    }
    // 300 MB in a small file. Nothing is decompressed after the 100,000th record: the reader would
    // otherwise report the truncated stream.
    let says = "more than 307300000 bytes; a CIFAR-10 batch has at most 100000 records of 3073";
    let endless = [gzip(&vec![0; 1000 * 3073]).repeat(101), vec![0x1f, 0x8b]].concat();
    fs::write(&batch, endless).unwrap();
    refused("endless", &batch, says, read);
    fs::File::create(&batch).unwrap().set_len(100_001 * 3073).unwrap();
    refused("large", &batch, says, read);

    for n in [1, 2, 4, 5] {
        fs::write(at(&format!("data_batch_{n}.bin")), record(n)).unwrap();
    }
    let batch = at("data_batch_3.bin");
    let read = || cifar10(dir.path(), Split::Train);
    refused("batch 3 missing", &batch, "os error 2", read);
    fs::create_dir(&batch).unwrap();
    refused("batch 3 a directory", &batch, "not a regular file", read);
}

#[test]
fn mnist_is_read_raw_and_gzipped() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let train = noise(5 * 28 * 28);
    fs::write(at("train-images-idx3-ubyte"), idx(&[I, 5, 28, 28], &train)).unwrap();
    fs::write(at("train-labels-idx1-ubyte.gz"), gzip(&idx(&[L, 5], &[5, 0, 4, 1, 9]))).unwrap();
    // The content, not the name, determines whether a file is compressed. It may consist of several
    // streams.
    let test = noise(2 * 28 * 28);
    let (head, tail) = test.split_at(1000);
    let streams = [gzip(&idx(&[I, 2, 28, 28], head)), gzip(tail)].concat();
    fs::write(at("t10k-images-idx3-ubyte"), streams).unwrap();
    fs::write(at("t10k-labels-idx1-ubyte.gz"), idx(&[L, 2], &[7, 2])).unwrap();

    let images = mnist(dir.path(), Split::Train).unwrap();
    assert_eq!((images.len(), images.shape()), (5, shape(1, 28, 28)));
    assert_eq!(images.pixels(), train);
    assert_eq!(images.labels(), Some(&[5, 0, 4, 1, 9][..]));
    let images = mnist(dir.path(), Split::Test).unwrap();
    assert_eq!((images.len(), images.shape()), (2, shape(1, 28, 28)));
    assert_eq!(images.pixels(), test);
    assert_eq!(images.labels(), Some(&[7, 2][..]));
}

#[test]
fn cifar10_is_read_in_the_order_of_its_batches() {
    let pixels = noise(6 * 3072);
    let records: Vec<_> = pixels
        .chunks(3072)
        .zip([6u8, 9, 9, 4, 1, 0])
        .map(|(image, label)| [&[label], image].concat())
        .collect();
    for folder in ["", "cifar-10-batches-bin"] {
        let dir = TempDir::new().unwrap();
        let files = dir.path().join(folder);
        fs::create_dir_all(&files).unwrap();
        for (n, batch) in [0..1, 1..2, 2..4, 4..5, 5..6].into_iter().enumerate() {
            let name = format!("data_batch_{}.bin", n + 1);
            fs::write(files.join(name), records[batch].concat()).unwrap();
        }
        fs::write(files.join("test_batch.bin"), &records[3]).unwrap();

        let images = cifar10(dir.path(), Split::Train).unwrap();
        assert_eq!((images.len(), images.shape()), (6, shape(3, 32, 32)));
        assert_eq!(images.pixels(), pixels);
        assert_eq!(images.labels(), Some(&[6, 9, 9, 4, 1, 0][..]));
        assert_eq!((images.classes(), images.read(3, &mut vec![0; 3072]).unwrap()), (10, Some(4)));
        let images = cifar10(dir.path(), Split::Test).unwrap();
        assert_eq!(images.pixels(), &pixels[3 * 3072..4 * 3072]);
        assert_eq!(images.labels(), Some(&[4][..]));
        // The number of classes is 10, although the last classes have no images.
        assert_eq!(images.classes(), 10);
    }
}

#[test]
fn the_bundled_digits_are_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
    let images = read_idx_images(dir.join("mnist-train-10k-images-idx3-ubyte.gz")).unwrap();
    let labels = read_idx_labels(dir.join("mnist-train-10k-labels-idx1-ubyte.gz")).unwrap();
    let images = images.with_labels(labels).unwrap();
    assert_eq!((images.len(), images.shape()), (10_000, shape(1, 28, 28)));
    assert_eq!(images.labels().unwrap()[..5], [5, 0, 4, 1, 9]);
    // Ink has the high value, so most pixels of a digit are 0.
    let blank = images.pixels().iter().filter(|&&p| p == 0).count();
    assert!((0.78..0.83).contains(&(blank as f64 / 7_840_000.0)), "{blank}");
}

#[test]
fn loading_takes_little_more_memory_than_the_pixels() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let within = |what: &str, usage: Usage, pixels: usize| {
        let peak = usage.peak;
        assert!(peak >= pixels, "{what}: not counted");
        assert!(peak < pixels / 5 * 6, "{what}: {peak} bytes at the peak for {pixels}");
    };

    let pixels = 60_000 * 28 * 28;
    let images = idx(&[I, 60_000, 28, 28], &noise(pixels));
    let labels = idx(&[L, 60_000], &vec![1; 60_000]);
    fs::write(at("train-images-idx3-ubyte"), &images).unwrap();
    fs::write(at("train-labels-idx1-ubyte"), &labels).unwrap();
    let (set, usage) = measured(|| mnist(dir.path(), Split::Train).unwrap());
    assert_eq!(set.pixels(), &images[16..]);
    within("MNIST", usage, pixels);
    drop(set);

    fs::write(at("train-images-idx3-ubyte"), gzip(&images)).unwrap();
    fs::write(at("train-labels-idx1-ubyte"), gzip(&labels)).unwrap();
    let (set, usage) = measured(|| mnist(dir.path(), Split::Train).unwrap());
    assert_eq!(set.pixels(), &images[16..]);
    within("gzipped MNIST", usage, pixels);
    drop(set);

    for n in 1..=5 {
        fs::write(at(&format!("data_batch_{n}.bin")), record(n).repeat(10_000)).unwrap();
    }
    let (set, usage) = measured(|| cifar10(dir.path(), Split::Train).unwrap());
    assert_eq!(set.len(), 50_000);
    within("CIFAR-10", usage, 50_000 * 3072);
}

#[test]
fn pixels_map_to_minus_one_to_one() {
    let images = Images::new((0..=255).collect(), (4, 8, 8)).unwrap();
    let mut pixels = vec![0; 256];
    assert_eq!(images.read(0, &mut pixels).unwrap(), None);
    assert_eq!(pixels, images.pixels());
    assert_eq!((normalized(0), normalized(255)), (-1.0, 1.0));
    for p in 0..=255 {
        let x = normalized(p);
        assert_eq!(x, f32::from(p) / 127.5 - 1.0);
        assert_eq!(((x + 1.0) * 127.5).round() as u8, p, "does not round back");
    }
}

#[test]
fn images_check_what_they_are_given() {
    let refused = |result: ddpm::Result<Images>, text: &str| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error:?}");
        assert_eq!(error.to_string(), text);
    };
    let fits = "three dimensions of at least 1, whose product fits in memory";
    refused(Images::new(vec![], (1, 0, 2)), &format!("shape is (1, 0, 2); it must be {fits}"));
    let huge = (usize::MAX, 2, 2);
    refused(Images::new(vec![], huge), &format!("shape is {huge:?}; it must be {fits}"));
    refused(
        Images::new(vec![0; 7], (1, 2, 3)),
        "pixels.len() is 7; it must be a multiple of 6, the pixels of an image of shape (1, 2, 3)",
    );
    let images = Images::new((0..12).collect(), (1, 2, 3)).unwrap();
    refused(
        images.clone().with_labels(vec![1; 3]),
        "labels.len() is 3; it must be 2, one for each image",
    );

    assert_eq!((images.classes(), images.read(1, &mut [0; 6]).unwrap()), (0, None));
    let mut images = images.with_labels(vec![4, 5]).unwrap();
    assert_eq!((images.classes(), images.read(1, &mut [0; 6]).unwrap()), (6, Some(5)));
    assert_eq!(images.get(1), Some(&[6, 7, 8, 9, 10, 11][..]));
    assert_eq!(images.get(2), None);
    // Times 6, this index wraps to 0.
    assert_eq!(images.get(1 << (usize::BITS - 1)), None);
    let error = images.read(2, &mut [0; 6]).unwrap_err().to_string();
    assert_eq!(error, "index is 2; it must be less than 2, the number of images");
    let error = images.read(1, &mut [0; 5]).unwrap_err().to_string();
    assert_eq!(error, "pixels.len() is 5; it must be 6, the pixels of an image");
    assert_eq!(format!("{images:?}"), "Images { len: 2, shape: (1, 2, 3), labelled: true, .. }");

    images.truncate(usize::MAX);
    assert_eq!((images.len(), images.labels()), (2, Some(&[4, 5][..])));
    images.truncate(1);
    assert_eq!((images.len(), images.labels()), (1, Some(&[4][..])));
    images.truncate(0);
    assert!(images.is_empty());
}

proptest! {
    #![proptest_config(inputs(64))]

    #[test]
    fn idx_images_of_any_size_come_back(
        count in 1u32..6, rows in 1u32..40, columns in 1u32..40, seed: u8, zipped: bool,
    ) {
        let pixels: Vec<_> =
            noise((count * rows * columns) as usize).iter().map(|p| p ^ seed).collect();
        let bytes = idx(&[I, count, rows, columns], &pixels);
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("images");
        fs::write(&path, if zipped { gzip(&bytes) } else { bytes }).unwrap();

        let images = read_idx_images(&path).unwrap();
        prop_assert_eq!(images.shape(), shape(1, rows as usize, columns as usize));
        prop_assert_eq!(images.len(), count as usize);
        prop_assert_eq!(images.pixels(), pixels);
    }

    #[test]
    fn no_damage_makes_a_reader_panic_or_reserve_much(
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..8),
        end: Index,
        zipped: bool,
    ) {
        let bytes = idx(&[I, 2, 5, 6], &noise(60));
        let mut bytes = if zipped { gzip(&bytes) } else { bytes };
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(1 + end.index(bytes.len()));
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("images");
        fs::write(&path, bytes).unwrap();
        let (_, usage) = measured(|| (read_idx_images(&path), read_idx_labels(&path)));
        prop_assert!(usage.largest <= LITTLE, "{} bytes", usage.largest);
    }
}
