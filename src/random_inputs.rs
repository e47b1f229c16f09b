//! Random inputs of tests.

use std::env;

use proptest::test_runner::{Config, RngSeed};

/// Configures a test of `count` random inputs. They are the same in every run, so that no test fails by chance. As
/// usual in proptest, `PROPTEST_RNG_SEED` selects other inputs, and `PROPTEST_CASES` their number.
pub(crate) fn inputs(count: u32) -> Config {
    let asked = Config::default();
    let cases = if env::var_os("PROPTEST_CASES").is_some() { asked.cases } else { count };
    let rng_seed = match asked.rng_seed {
        RngSeed::Random => RngSeed::Fixed(0),
        fixed => fixed,
    };
    Config { cases, rng_seed, ..asked }
}
