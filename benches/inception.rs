//! Times the extractor `Inception` on random images of 299 x 299 pixels.
//!
//! ```text
//! cargo bench --bench inception -- --weights FILE [--batch N] [--iters N] [--threads N]
//! ```
//!
//! `tests/data/generate/inception.py OUT_DIR --save-weights` makes a file of weights. The output is a line of JSON.

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use ddpm::Result;
use ddpm::data::Images;
use ddpm::eval::{Extractor, Inception};

#[derive(Parser)]
struct Args {
    /// The weights.
    #[arg(long)]
    weights: PathBuf,
    /// Images per batch.
    #[arg(long, default_value_t = 32, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    batch: usize,
    /// The number of timed runs, after one that is not timed.
    #[arg(long, default_value_t = 3, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    iters: usize,
    /// The number of threads; by default one per core.
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    threads: Option<usize>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("first use");
    }
    let inception = Inception::load(&args.weights)?;
    let byte = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 24) as u8;
    let pixels = (0..args.batch * 3 * 299 * 299).map(byte).collect();
    let images = Images::new(pixels, (3, 299, 299))?;
    inception.extract(&images)?;
    let mut ms = Vec::new();
    for _ in 0..args.iters {
        let start = Instant::now();
        inception.extract(&images)?;
        ms.push(1e3 * start.elapsed().as_secs_f64());
    }
    ms.sort_by(f64::total_cmp);
    let line = serde_json::json!({
        "name": "inception", "batch": args.batch, "threads": rayon::current_num_threads(),
        "ms_min": ms[0], "ms_median": ms[ms.len() / 2],
    });
    println!("{line}");
    Ok(())
}
