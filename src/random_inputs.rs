//! Random inputs of tests.

use std::env;

use proptest::test_runner::{Config, RngSeed};

/// A test of `count` random inputs, which are the same in every run: no test fails by chance. As in
/// any test of proptest, `PROPTEST_RNG_SEED` asks for other inputs, and `PROPTEST_CASES` for more.
pub(crate) fn inputs(count: u32) -> Config {
    let asked = Config::default();
    let cases = if env::var_os("PROPTEST_CASES").is_some() { asked.cases } else { count };
    let rng_seed = match asked.rng_seed {
        RngSeed::Random => RngSeed::Fixed(0),
        fixed => fixed,
    };
    Config { cases, rng_seed, ..asked }
}
