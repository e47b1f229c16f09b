use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use console::Term;

use super::terminal_line::Line;
use crate::error::Result;
use crate::train::{Frontend, Metrics, Observer, Published, Run};

/// The interval between lines without a terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The minimum interval between redraws.
const DRAW_EVERY: Duration = Duration::from_millis(50);

/// Width of the bar between its brackets, in columns.
const BAR: u64 = 24;

/// Seconds over which the rate is averaged.
const RATE_SECONDS: f64 = 20.0;

/// The fraction of the smoothed loss that remains after each step.
const LOSS_DECAY: f64 = 0.98;

/// Shows the progress on standard error: in one line that is redrawn on a terminal of any width, and elsewhere as a
/// line about every ten seconds.
///
/// The rest of the library prints nothing. This observer writes to standard error, through `console::Term`, because
/// the program chose it for that purpose. It also shows the work and the warnings of the run's other observers.
///
/// Clones share one line. The observer can also show other work in steps:
///
/// ```
/// let progress = ddpm::observe::Progress::started(3);
/// for step in 1..=3 {
///     progress.advance(step);
/// }
/// progress.finish();
/// ```
#[derive(Debug, Clone)]
pub struct Progress(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    is_terminal: bool,
    /// `None` without a terminal, and before and after the work.
    line: Option<Line>,
    total: u64,
    at: u64,
    begun: Instant,
    last_step: Instant,
    /// The time at which the last line was drawn or printed.
    last_line: Instant,
    /// Steps and seconds, both averaged the same way.
    rate: (f64, f64),
    /// Sum and weight of an exponential mean.
    loss: (f64, f64),
    loss_step: u64,
    /// The published number that the line shows: its name and its latest value.
    shown: Option<(String, Option<f64>)>,
    /// Work other than steps.
    work: String,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// Creates the progress of work that has not started. Nothing is shown yet.
    pub fn new() -> Self {
        let is_terminal = std::io::stderr().is_terminal() && !console::is_dumb();
        let now = Instant::now();
        Self(Arc::new(Mutex::new(State {
            is_terminal,
            line: None,
            total: 0,
            at: 0,
            begun: now,
            last_step: now,
            last_line: now,
            rate: (0.0, 0.0),
            loss: (0.0, 0.0),
            loss_step: 0,
            shown: None,
            work: String::new(),
        })))
    }

    /// Also shows the latest number that an observer [published](Run::publish) under this name.
    #[must_use]
    pub fn showing(self, name: impl Into<String>) -> Self {
        self.lock().shown = Some((name.into(), None));
        self
    }

    /// Creates the progress of `total` steps, and starts it.
    pub fn started(total: u64) -> Self {
        let progress = Self::new();
        progress.start(0, total);
        progress
    }

    /// Starts at step `at` of `total`, and shows the line. Output that should appear above the line must be written
    /// before.
    pub fn start(&self, at: u64, total: u64) {
        let mut state = self.lock();
        state.line = state.is_terminal.then(Line::new);
        (state.at, state.loss_step, state.total) = (at, at, total);
        state.begun = Instant::now();
        (state.last_step, state.last_line) = (state.begun, state.begun);
        state.draw();
    }

    /// Shows that step `at` is done.
    pub fn advance(&self, at: u64) {
        let mut state = self.lock();
        let seconds = state.last_step.elapsed().as_secs_f64();
        let keep = (-seconds / RATE_SECONDS).exp();
        let steps = at.saturating_sub(state.at) as f64;
        state.rate = (state.rate.0 * keep + steps, state.rate.1 * keep + seconds);
        state.at = at;
        state.last_step = Instant::now();
        state.work.clear();
        state.show();
    }

    /// Reports the mean loss of the steps since the last report.
    pub fn loss(&self, step: u64, loss: f64) {
        let mut state = self.lock();
        let keep = LOSS_DECAY.powf(step.saturating_sub(state.loss_step) as f64);
        let (sum, weight) = state.loss;
        state.loss = (sum * keep + loss * (1.0 - keep), weight * keep + 1.0 - keep);
        state.loss_step = step;
    }

    /// The smoothed loss, if one was reported.
    pub fn smooth_loss(&self) -> Option<f64> {
        self.lock().smooth_loss()
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        self.lock().begun.elapsed()
    }

    /// Prints a line on standard error, above the progress.
    pub fn say(&self, text: &str) {
        self.lock().say(text);
    }

    /// Stops drawing, and leaves the line as it is.
    pub fn finish(&self) {
        self.lock().finish();
    }

    /// Locks the state. It stays usable after a panic of another thread, because it is only displayed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Frontend for Progress {
    fn working(&self, on: &str) {
        let mut state = self.lock();
        let other = state.work.is_empty() != on.is_empty();
        state.work = on.to_owned();
        // The duration of other work does not count as that of a step.
        state.last_step = Instant::now();
        if other && state.line.is_some() { state.draw() } else { state.show() }
    }

    fn warn(&self, warning: &str) {
        self.say(&format!("warning: {warning}"));
    }

    fn finish(&self) {
        Progress::finish(self);
    }
}

impl Observer for Progress {
    fn on_start(&mut self, run: &Run<'_>) -> Result<()> {
        self.start(run.step(), run.config().steps);
        Ok(())
    }

    fn on_metrics(&mut self, _: &Run<'_>, metrics: &Metrics) -> Result<()> {
        self.loss(metrics.step, metrics.loss.into());
        Ok(())
    }

    fn on_published(&mut self, _: &Run<'_>, published: &[Published]) -> Result<()> {
        if let Some((name, latest)) = &mut self.lock().shown {
            let values = published.iter().filter(|value| value.name == *name);
            *latest = values.filter_map(Published::scalar).next_back().or(*latest);
        }
        Ok(())
    }

    fn on_step(&mut self, run: &Run<'_>) -> Result<ControlFlow<()>> {
        self.advance(run.step());
        Ok(ControlFlow::Continue(()))
    }

    fn frontends(&self) -> Vec<Arc<dyn Frontend>> {
        vec![Arc::new(self.clone())]
    }
}

impl State {
    fn smooth_loss(&self) -> Option<f64> {
        let (sum, weight) = self.loss;
        (weight > 0.0).then(|| sum / weight)
    }

    /// Draws or prints the line if it is due.
    fn show(&mut self) {
        let every = if self.line.is_some() { DRAW_EVERY } else { LINE_EVERY };
        if self.last_line.elapsed() < every {
            return;
        }
        self.last_line = Instant::now();
        if self.line.is_some() {
            self.draw();
        } else if let Some(text) = self.texts().first() {
            self.say(text);
        }
    }

    fn draw(&mut self) {
        let texts = self.texts();
        let with_bar = format!("{} {}", self.bar(), texts.first().map_or("", String::as_str));
        if let Some(line) = &mut self.line {
            line.draw(&[&[with_bar][..], &texts].concat());
        }
    }

    /// Prints a line. Write errors are ignored, so that a program continues if its terminal or pipe is closed.
    fn say(&mut self, text: &str) {
        match &mut self.line {
            Some(line) => line.say(text),
            None => {
                let _ = Term::stderr().write_line(text);
            }
        }
    }

    fn finish(&mut self) {
        if let Some(mut line) = self.line.take() {
            line.leave();
        }
    }

    fn bar(&self) -> String {
        let filled = (self.at.min(self.total) * BAR / self.total.max(1)) as usize;
        let head = if self.at < self.total { ">" } else { "" };
        format!("[{:width$}]", "=".repeat(filled) + head, width = BAR as usize)
    }

    /// Returns the texts of the line, the longest first. Each is for terminals that are too narrow for the previous
    /// one.
    fn texts(&self) -> Vec<String> {
        let Self { at, total, work, .. } = self;
        let count = format!("{at}/{total}");
        if !work.is_empty() {
            return vec![format!("{count} {work}"), work.clone()];
        }
        let (steps, seconds) = self.rate;
        if steps == 0.0 {
            return vec![count];
        }
        let rate = steps / seconds.max(1e-9);
        let left = (total - at.min(total)) as f64 / rate.max(1e-9);
        let left = format!("{} left", duration(Duration::from_secs_f64(left.min(1e9))));
        let loss = self.smooth_loss().map(|loss| format!("loss {loss:.4}, ")).unwrap_or_default();
        let shown = match &self.shown {
            Some((name, Some(value))) => format!("{name} {value:.4}, "),
            _ => String::new(),
        };
        let rate = if rate < 10.0 { format!("{rate:.2}") } else { format!("{rate:.0}") };
        vec![
            format!("{count} {rate} steps/s, {loss}{shown}{left}"),
            format!("{count} {loss}{shown}{left}"),
            format!("{count} {loss}{left}"),
            format!("{count} {left}"),
        ]
    }
}

impl Drop for State {
    /// Ends the line, so that the next output begins a new one.
    fn drop(&mut self) {
        self.finish();
    }
}

/// Formats hours, minutes and seconds, after the days if there are any.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let days = if days > 0 { format!("{days}d ") } else { String::new() };
    format!("{days}{hours:02}:{:02}:{:02}", seconds / 60 % 60, seconds % 60)
}
