//! A bar on a terminal, now and then a line elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, ProgressBar, ProgressStyle};

use super::tell::err;

/// From one line to the next where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Seconds over which the rate is averaged.
const RATE_SECONDS: f64 = 20.0;

/// How much of the smoothed loss stays at each step.
const LOSS_DECAY: f64 = 0.98;

pub struct Progress {
    /// None where there is no terminal.
    bar: Option<ProgressBar>,
    total: u64,
    at: u64,
    last_step: Instant,
    last_line: Instant,
    /// Steps and seconds, both averaged the same way.
    rate: (f64, f64),
    /// Sum and weight of an exponential mean.
    loss: (f64, f64),
    loss_step: u64,
}

impl Progress {
    /// Of `total` steps, of which there were `at` before.
    pub fn new(total: u64, at: u64) -> Self {
        let style = ProgressStyle::with_template("[{bar:24}] {pos}/{len} {msg}")
            .expect("the template is valid")
            .progress_chars("=> ");
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_style(style).with_position(at);
            bar.tick();
            bar
        });
        let now = Instant::now();
        let (rate, loss) = ((0.0, 0.0), (0.0, 0.0));
        Self { bar, total, at, last_step: now, last_line: now, rate, loss, loss_step: at }
    }

    /// After each step.
    pub fn advance(&mut self, at: u64) {
        let seconds = self.last_step.elapsed().as_secs_f64();
        let keep = (-seconds / RATE_SECONDS).exp();
        let steps = at.saturating_sub(self.at) as f64;
        self.rate = (self.rate.0 * keep + steps, self.rate.1 * keep + seconds);
        self.at = at;
        self.last_step = Instant::now();
        match &self.bar {
            Some(bar) => {
                bar.set_message(self.message());
                bar.set_position(at);
            }
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                err!("{at}/{} {}", self.total, self.message());
            }
            None => {}
        }
    }

    /// The mean loss of the steps since the last one.
    pub fn loss(&mut self, step: u64, loss: f64) {
        let keep = LOSS_DECAY.powf((step - self.loss_step) as f64);
        let (sum, weight) = self.loss;
        self.loss = (sum * keep + loss * (1.0 - keep), weight * keep + 1.0 - keep);
        self.loss_step = step;
    }

    /// Other work than steps: its time does not count.
    pub fn note(&mut self, work: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(work.to_owned());
        }
        self.last_step = Instant::now();
    }

    /// Says a line on standard error, above the bar.
    pub fn say(&self) -> impl Fn(&str) + Send + 'static {
        let bar = self.bar.clone();
        move |line| match &bar {
            // Not `suspend`: what panics in there leaves the bar's lock poisoned.
            Some(bar) => bar.println(line),
            None => err!("{line}"),
        }
    }

    /// The bar stays as it is, and moves no more.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    fn message(&self) -> String {
        let rate = self.rate.0 / self.rate.1.max(1e-9);
        let left = (self.total - self.at.min(self.total)) as f64 / rate.max(1e-9);
        let left = FormattedDuration(Duration::from_secs(left.min(1e9) as u64));
        let rate = if rate < 10.0 { format!("{rate:.2}") } else { format!("{rate:.0}") };
        match self.loss {
            (_, 0.0) => format!("{rate} steps/s, {left} left"),
            (sum, weight) => format!("{rate} steps/s, loss {:.4}, {left} left", sum / weight),
        }
    }
}
