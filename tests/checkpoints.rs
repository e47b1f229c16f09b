//! Checkpoints that are saved: they resume exactly, are complete at any moment, and replace nothing else.

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use ddpm::process::Prediction;
use ddpm::sample::SamplerConfig;
use ddpm::train::{AdamConfig, Saved};
use ddpm::{Checkpoint, Diffusion, Error, NoiseSchedule, Solver, TrainConfig, Trainer, UNetConfig};

mod runs;
use runs::{
    FILES, Waves, config, edit, names, network, new, resume, saved, snapshot, step_and_save,
    truncate,
};

#[test]
fn a_resumed_run_equals_the_unbroken_one() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, broken] = ["whole", "broken"].map(|name| dir.path().join(name));
    let mut trainer = new(config(7));
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&whole).unwrap();

    // 11 images in batches of 4: both stops are in the middle of an epoch.
    let mut trainer = new(config(2));
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&broken).unwrap();
    for steps in [5, 7] {
        let mut trainer = resume(&broken, config(steps)).unwrap();
        trainer.fit(&Waves(11), &mut ()).unwrap();
        trainer.save(&broken).unwrap();
    }
    for file in FILES {
        assert_eq!(
            fs::read(whole.join(file)).unwrap(),
            fs::read(broken.join(file)).unwrap(),
            "{file}"
        );
    }
    assert_eq!(Checkpoint::open(&broken).unwrap().step(), 7);
}

#[test]
fn the_last_k_are_kept_and_nothing_else_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    for other in ["checkpoint-000000007", "checkpoint-notes", "checkpoint-12"] {
        fs::create_dir(dir.path().join(other)).unwrap(); // of somebody else: no checkpoint in it
    }
    let mut trainer = new(TrainConfig { keep_checkpoints: 3, ..config(100) });
    for _ in 0..6 {
        let batch = trainer.next_batch(&Waves(11)).unwrap();
        trainer.step(&batch).unwrap();
        trainer.save(&path).unwrap();
    }
    trainer.save(&path).unwrap(); // the same step again
    let expected = [
        "checkpoint",
        "checkpoint-000000005",
        "checkpoint-000000006",
        "checkpoint-000000007",
        "checkpoint-12",
        "checkpoint-notes",
    ];
    assert_eq!(names(dir.path()), expected);
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 6);
    let batch = trainer.next_batch(&Waves(11)).unwrap();
    trainer.step(&batch).unwrap();
    trainer.save(&path).unwrap();
    // Step 7 would now be moved to a path where a foreign directory is.
    let error = trainer.save(&path).unwrap_err();
    let expected = dir.path().join("checkpoint-000000007");
    assert!(matches!(&error, Error::Occupied { path, .. } if *path == expected), "{error}");
    assert!(error.to_string().contains("it holds no checkpoint, and one of that step"), "{error}");
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 7);
    let older = dir.path().join("checkpoint-000000005");
    assert_eq!(Checkpoint::open(older).unwrap().step(), 5);
}

#[test]
fn a_new_run_beside_an_old_one_keeps_both() {
    let (dir, path) = saved();
    let mut trainer = new(TrainConfig { seed: 1, ..config(100) });
    // The checkpoint of the old run that was moved aside, and a copy by a user, whose name has another step.
    let old = dir.path().join("checkpoint-000000002");
    fs::rename(&path, &old).unwrap();
    let copy = dir.path().join("checkpoint-20251123153000");
    fs::create_dir(&copy).unwrap();
    for file in FILES {
        fs::copy(old.join(file), copy.join(file)).unwrap();
    }
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(20));
        let batch = trainer.next_batch(&Waves(11)).unwrap();
        trainer.step(&batch).unwrap();
        trainer.save(&path).unwrap();
    }
    let kept =
        ["checkpoint", "checkpoint-000000001", "checkpoint-000000002", "checkpoint-20251123153000"];
    assert_eq!(names(dir.path()), kept);

    // The new run cannot move its own step 2 to this path: the save fails, and nothing is lost.
    let batch = trainer.next_batch(&Waves(11)).unwrap();
    trainer.step(&batch).unwrap();
    let before = snapshot(dir.path());
    let error = trainer.save(&path).unwrap_err();
    assert!(matches!(&error, Error::Occupied { path, .. } if *path == old), "{error}");
    assert!(error.to_string().contains("another run: train.seed is 0"), "{error}");
    assert_eq!(snapshot(dir.path()), before);

    fs::remove_dir_all(&old).unwrap();
    trainer.save(&path).unwrap();
    assert_eq!(Checkpoint::open(&old).unwrap().train_config().seed, 1);
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().train_config().seed, 1);
}

#[test]
fn between_the_two_renames_the_older_one_is_found() {
    let (dir, path) = saved();
    fs::rename(&path, dir.path().join("checkpoint-000000002")).unwrap();
    fs::create_dir(dir.path().join("checkpoint.saving")).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 2);
    let trainer = resume(&path, config(3)).unwrap();
    trainer.save(&path).unwrap();
    assert!(!names(dir.path()).contains(&"checkpoint.saving".to_string()));
}

#[test]
fn between_the_two_renames_the_new_one_is_found_and_not_lost() {
    let (dir, path) = saved();
    resume(&path, config(3)).unwrap().save(dir.path().join("other")).unwrap();
    let mut trainer = resume(&path, config(3)).unwrap();
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&path).unwrap();
    let saving = dir.path().join("checkpoint.saving");
    fs::rename(&path, &saving).unwrap();
    assert_eq!(names(dir.path()), ["checkpoint-000000002", "checkpoint.saving", "other"]);
    let found = Checkpoint::open(&path).unwrap();
    assert_eq!((found.step(), found.dir()), (3, &*saving));

    // A run that may not replace the checkpoint leaves it unchanged.
    let before = snapshot(dir.path());
    new(TrainConfig { seed: 1, ..config(1) }).save(&path).unwrap_err();
    assert_eq!(snapshot(dir.path()), before);

    // The next save first moves it to its place, and then aside.
    let mut trainer = resume(&path, config(4)).unwrap();
    trainer.fit(&Waves(11), &mut ()).unwrap();
    trainer.save(&path).unwrap();
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint-000000003", "other"]);
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 4);

    // An incomplete new checkpoint is ignored.
    fs::rename(&path, &saving).unwrap();
    truncate(&saving.join("checkpoint.json"), |n| n - 1);
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 3);
    fs::remove_file(saving.join("checkpoint.json")).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 3);
    fs::remove_dir_all(dir.path().join("checkpoint-000000003")).unwrap();
    let error = Checkpoint::open(&path).map(drop).unwrap_err();
    assert!(matches!(error, Error::NoCheckpoint { path: at, .. } if at == path));
}

#[test]
fn another_runs_checkpoint_is_not_replaced() {
    let (dir, path) = saved();
    let before = snapshot(dir.path());
    let refused = |network, config, diffusion| {
        let trainer = Trainer::new(network, config, diffusion, &Device::Cpu).unwrap();
        let error = trainer.save(&path).unwrap_err();
        assert!(matches!(error, Error::ConfigMismatch { .. }), "{error}");
        assert_eq!(snapshot(dir.path()), before, "{error}");
        error.to_string()
    };
    let seeded = refused(network(), TrainConfig { seed: 1, ..config(2) }, Diffusion::ddpm());
    let expected =
        "train.seed is 0 in the checkpoint, but 1 was requested; save another run elsewhere";
    assert_eq!(seeded, expected);
    refused(UNetConfig { time_dim: 32, ..network() }, config(2), Diffusion::ddpm());
    let cosine = Diffusion::new(NoiseSchedule::cosine(1000).unwrap(), Prediction::Epsilon);
    refused(network(), config(2), cosine);

    // A second run with the same configuration would remove the old one after a few saves.
    let error = new(TrainConfig { log_every: 5, ..config(9) }).save(&path).unwrap_err();
    assert!(error.to_string().contains("step is 0; it must be at least 2"), "{error}");
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn what_a_killed_save_left_is_removed_by_the_next() {
    let (dir, path) = saved();
    let trainer = resume(&path, config(3)).unwrap();
    for left in ["checkpoint.saving", "checkpoint.removing"] {
        fs::create_dir(dir.path().join(left)).unwrap();
        fs::write(dir.path().join(left).join(FILES[0]), "the half of it").unwrap();
    }
    trainer.save(&path).unwrap();
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint-000000002"]);
}

#[test]
fn a_failed_save_leaves_the_last_checkpoint_and_no_other_files() {
    let (dir, path) = saved();
    let before = fs::read(path.join(FILES[0])).unwrap();
    let trainer = resume(&path, config(3)).unwrap();
    // A file at the path of the directory for new files belongs to the user.
    fs::write(dir.path().join("checkpoint.saving"), "in the way").unwrap();
    let error = trainer.save(&path).unwrap_err();
    assert!(matches!(error, Error::Occupied { .. }), "{error}");
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint.saving"]);
    assert_eq!(fs::read(path.join(FILES[0])).unwrap(), before);
    let error = trainer.save("/dev/null/checkpoint").unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn weights_of_a_file_can_be_trained_in_another_way() {
    let (_dir, path) = saved();
    let other = TrainConfig { seed: 9, optimizer: AdamConfig::adamw(1e-3, 0.1), ..config(1) };
    let mut trainer = new(other);
    trainer.set_weights(path.join(FILES[0])).unwrap();
    let saved = resume(&path, config(2)).unwrap();
    for (name, var) in saved.vars() {
        let [ours, theirs] = [&trainer.vars()[name], var].map(|v| v.flatten_all().unwrap());
        assert_eq!(ours.to_vec1::<f32>().unwrap(), theirs.to_vec1::<f32>().unwrap(), "{name}");
    }
    trainer.fit(&Waves(11), &mut ()).unwrap();
    let message = trainer.set_weights(path.join(FILES[0])).unwrap_err().to_string();
    assert_eq!(message, "step is 1; it must be 0 when weights are set");
}

#[test]
fn another_data_set_is_noticed() {
    let (_dir, path) = saved();
    let mut trainer = resume(&path, config(3)).unwrap();
    let message = trainer.fit(&Waves(12), &mut ()).unwrap_err().to_string();
    assert!(
        message.starts_with("number of images is 12; it must be 11, as earlier in"),
        "{message}"
    );
}

#[test]
fn within_a_run_the_step_is_the_age_whatever_the_times_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let config = TrainConfig { keep_checkpoints: 3, ..config(100) };
    let mut trainer = new(config.clone());
    for _ in 0..3 {
        step_and_save(&mut trainer, &path);
    }
    // File times as a copy may set them: later steps have older files.
    let now = std::time::SystemTime::now();
    for (hours, name) in
        ["checkpoint-000000001", "checkpoint-000000002", "checkpoint"].iter().enumerate()
    {
        let file =
            fs::File::options().append(true).open(dir.path().join(name).join("checkpoint.json"));
        file.unwrap().set_modified(now - Duration::from_secs(3600 * (hours as u64 + 1))).unwrap();
    }
    step_and_save(&mut resume(&path, config).unwrap(), &path);
    let expected = ["checkpoint", "checkpoint-000000002", "checkpoint-000000003"];
    assert_eq!(names(dir.path()), expected);
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 3);
}

/// Runs a test of this file in a separate process, without root's permissions if it has them, to test failing
/// removals.
#[cfg(unix)]
fn as_ordinary_user(test: &str, dir: &Path) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    use std::os::unix::process::CommandExt;

    const NOBODY: u32 = 65534;
    let program = dir.join("tests");
    // The program is copied to a place that the other user can read. A separate process copies it: a program
    // that another test's child still has open for writing is busy.
    let copied = Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&program).status();
    assert!(copied.unwrap().success());
    let mut command = Command::new(&program);
    command.args(["--exact", test, "--nocapture"]).env(PROTECTED, dir).current_dir("/");
    if dir.metadata().unwrap().uid() == 0 {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
        command.uid(NOBODY).gid(NOBODY);
    }
    let output = command.output().unwrap();
    let printed = [output.stdout, output.stderr]
        .map(|printed| String::from_utf8_lossy(&printed).into_owned());
    assert!(
        output.status.success() && printed[0].contains("1 passed"),
        "{}{}",
        printed[0],
        printed[1]
    );
}

#[cfg(unix)]
const PROTECTED: &str = "DDPM_TEST_PROTECTS_IN";

/// Runs only as a child process, started by the test below.
#[cfg(unix)]
#[test]
fn saves_beside_protected_checkpoints() {
    use std::os::unix::fs::PermissionsExt;

    let Some(dir) = std::env::var_os(PROTECTED).map(PathBuf::from) else { return };
    let path = dir.join("checkpoint");
    let allow = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let is_not_removed = |saved: &Saved, at: &Path| {
        let [Error::NotRemoved { path, source }] = saved.warnings.as_slice() else {
            panic!("{:?}", saved.warnings)
        };
        assert_eq!((path.as_path(), source.kind()), (at, std::io::ErrorKind::PermissionDenied));
    };
    let mut trainer = new(config(100));
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    // A checkpoint that a user protects from changes.
    let kept = dir.join("checkpoint-000000001");
    allow(&kept, 0o555);
    for step in 3..6 {
        is_not_removed(&step_and_save(&mut trainer, &path), &kept);
        assert_eq!(Checkpoint::open(&path).unwrap().step(), step);
        assert_eq!(Checkpoint::open(&kept).unwrap().step(), 1);
        let last = format!("checkpoint-{:09}", step - 1);
        assert_eq!(names(&dir), ["checkpoint", "checkpoint-000000001", &last, "tests"]);
    }
    allow(&kept, 0o755);
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());

    // The remains of an interrupted removal, and of a copy at the path of a step that is saved again.
    let rest = dir.join("checkpoint.removing");
    fs::create_dir(&rest).unwrap();
    fs::write(rest.join("model.safetensors"), "half of it").unwrap();
    allow(&rest, 0o555);
    is_not_removed(&step_and_save(&mut trainer, &path), &rest);
    assert_eq!(names(&dir), ["checkpoint", "checkpoint-000000006", "checkpoint.removing", "tests"]);
    fs::rename(&path, dir.join("checkpoint-000000007")).unwrap();
    fs::create_dir(&path).unwrap();
    for file in fs::read_dir(dir.join("checkpoint-000000007")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), path.join(file.file_name())).unwrap();
    }
    allow(&dir.join("checkpoint-000000007"), 0o555);
    let warnings = step_and_save(&mut trainer, &path).warnings;
    assert!(warnings.iter().all(|w| matches!(w, Error::NotRemoved { .. })), "{warnings:?}");
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 8);
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            allow(&path, 0o755);
        }
    }
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    assert_eq!(names(&dir), ["checkpoint", "checkpoint-000000008", "tests"]);
}

/// Runs only as a child process, started by the test below.
#[cfg(unix)]
#[test]
fn claims_in_a_directory_of_others() {
    use std::os::unix::fs::PermissionsExt;

    let Some(dir) = std::env::var_os(PROTECTED).map(PathBuf::from) else { return };
    let out = dir.join("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o555)).unwrap();
    let error = new(config(9)).claim(out.join("checkpoint")).unwrap_err();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o755)).unwrap();
    let Error::Io { path, source } = &error else { panic!("{error}") };
    assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
    assert_eq!(*path, out.join("checkpoint.lock"));
}

#[cfg(unix)]
#[test]
fn a_directory_that_is_not_writable_is_an_error_of_permission() {
    let dir = tempfile::tempdir().unwrap();
    as_ordinary_user("claims_in_a_directory_of_others", dir.path());
}

#[test]
fn what_no_save_wrote_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let theirs = ["checkpoint.removing", "checkpoint.removing-2"].map(|name| dir.path().join(name));
    for theirs in &theirs {
        fs::create_dir(theirs).unwrap();
        fs::write(theirs.join("thesis.txt"), "").unwrap();
    }
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    fs::write(path.join("notes.txt"), "the good one").unwrap();
    step_and_save(&mut trainer, &path);
    let warnings = step_and_save(&mut trainer, &path).warnings;
    let first = dir.path().join("checkpoint-000000001");
    let [Error::NotRemoved { path: found, source }] = warnings.as_slice() else {
        panic!("{warnings:?}")
    };
    assert_eq!(*found, first);
    assert!(source.to_string().starts_with("it holds notes.txt, which is not"), "{source}");
    // Files that a system adds do not prevent a save.
    fs::remove_file(first.join("notes.txt")).unwrap();
    fs::write(first.join(".DS_Store"), "").unwrap();
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    assert!(!first.exists());
    assert!(theirs.iter().all(|theirs| theirs.join("thesis.txt").is_file()));
}

#[test]
fn a_claim_that_fails_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let [path, other] = ["checkpoint", "other"].map(|name| dir.path().join(name));
    fs::write(&other, "").unwrap();
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    trainer.claim(&other).unwrap_err();
    fs::create_dir(dir.path().join("checkpoint-000000003")).unwrap();
    trainer.claim(&path).unwrap_err();
    assert!(matches!(new(config(9)).claim(&path), Err(Error::Locked { .. })));
}

#[cfg(unix)]
#[test]
fn an_old_checkpoint_that_cannot_be_removed_is_a_warning_and_prevents_no_save() {
    let dir = tempfile::tempdir().unwrap();
    as_ordinary_user("saves_beside_protected_checkpoints", dir.path());
}

#[test]
fn a_claim_finds_what_is_in_the_way_before_the_first_step() {
    type Put = fn(&Path);
    let cases: &[(&str, Put, Option<&str>)] = &[
        ("nothing", |_| {}, None),
        ("an empty directory", |p| fs::create_dir(p).unwrap(), None),
        ("a file", |p| fs::write(p, "").unwrap(), Some("it is a file")),
        (
            "another's directory",
            |p| {
                fs::create_dir(p).unwrap();
                fs::write(p.join("notes.txt"), "").unwrap();
            },
            Some("it holds notes.txt, and no checkpoint.json"),
        ),
        (
            "half a copy",
            |p| {
                fs::create_dir(p).unwrap();
                FILES.iter().for_each(|file| fs::write(p.join(file), "").unwrap());
            },
            Some("it holds ema.safetensors and 2 more, and no checkpoint.json"),
        ),
        #[cfg(unix)]
        (
            "a dangling link",
            |p| std::os::unix::fs::symlink("nowhere", p).unwrap(),
            Some("it is a link to nowhere, which does not exist"),
        ),
        #[cfg(unix)]
        (
            "a link to an empty directory",
            |p| {
                fs::create_dir(p.with_file_name("large-disk")).unwrap();
                std::os::unix::fs::symlink("large-disk", p).unwrap();
            },
            Some(
                "it is a link to large-disk, which holds no checkpoint; link the directory around it",
            ),
        ),
        (
            "another's directory where new files belong",
            |p| {
                let saving = p.with_file_name("checkpoint.saving");
                fs::create_dir(&saving).unwrap();
                fs::write(saving.join("notes.txt"), "").unwrap();
            },
            Some("checkpoint.saving: no checkpoint can be saved here: it holds notes.txt, which"),
        ),
        (
            "another's directory where an old one is moved",
            |p| fs::create_dir(p.with_file_name("checkpoint-000000005")).unwrap(),
            Some("checkpoint-000000005: no checkpoint can be saved here: it holds no checkpoint"),
        ),
        (
            "another's directory that is never in the way",
            |p| fs::create_dir(p.with_file_name("checkpoint-000000010")).unwrap(),
            None,
        ),
        (
            "another run",
            |p| drop(new(TrainConfig { seed: 3, ..config(9) }).save(p).unwrap()),
            Some(
                "train.seed is 3 in the checkpoint, but 0 was requested; save another run elsewhere",
            ),
        ),
        (
            "a later step",
            |p| drop(step_and_save(&mut new(config(9)), p)),
            Some("step is 0; it must be at least 1"),
        ),
        (
            "a damaged checkpoint",
            |p| {
                new(config(9)).save(p).unwrap();
                truncate(&p.join("checkpoint.json"), |n| n / 2);
            },
            Some("checkpoint.json: damaged file"),
        ),
        ("the run itself", |p| drop(new(config(9)).save(p).unwrap()), None),
    ];
    for &(what, put, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint");
        put(&path);
        let before = snapshot(dir.path());
        let mut trainer = new(config(9));
        let claimed = trainer.claim(&path).map_err(|e| e.to_string());
        assert_eq!(
            snapshot(dir.path()).len(),
            before.len() + usize::from(claimed.is_ok()),
            "{what}"
        );
        match (claimed, expected) {
            (Ok(()), None) => drop(step_and_save(&mut trainer, &path)),
            (Err(message), Some(expected)) => {
                assert!(message.contains(expected), "{what}: {message}");
                assert_eq!(snapshot(dir.path()), before, "{what}");
                // The claim returns the error that would have ended the run.
                assert_eq!(
                    trainer.save(&path).is_err(),
                    !what.contains("old one is moved"),
                    "{what}"
                );
            }
            (claimed, _) => panic!("{what}: {claimed:?}"),
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_mount_point_is_no_place_for_checkpoints() {
    let mount = Path::new("/dev/shm");
    use std::os::unix::fs::MetadataExt;
    let device = |path: &str| fs::metadata(path).map(|m| m.dev()).ok();
    if device("/dev/shm").is_none() || device("/dev/shm") == device("/dev") {
        return; // not one here
    }
    let error = new(config(9)).claim(mount).unwrap_err();
    assert!(
        error.to_string().starts_with("/dev/shm: no checkpoint can be saved here: it is a mount")
    );
    assert!(!Path::new("/dev/shm.lock").exists());
}

#[cfg(unix)]
#[test]
fn a_link_for_the_run_whose_target_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    std::os::unix::fs::symlink("unplugged", &out).unwrap();
    let error = new(config(9)).claim(out.join("checkpoint")).unwrap_err();
    assert!(matches!(&error, Error::Occupied { path, .. } if *path == out), "{error}");
    assert!(
        error.to_string().ends_with("it is a link to unplugged, which does not exist"),
        "{error}"
    );
}

#[cfg(unix)]
#[test]
fn one_run_has_one_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    let before = snapshot(dir.path());
    let mut second = new(config(9));
    for error in [second.claim(&path).unwrap_err(), second.save(&path).map(drop).unwrap_err()] {
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        let expected = "checkpoint: this process saves here; only one run at a time may";
        assert!(error.to_string().ends_with(expected), "{error}");
        assert_eq!(snapshot(dir.path()), before);
    }
    // By another path to the same place, and again.
    step_and_save(
        &mut trainer,
        &dir.path().join("../").join(dir.path().file_name().unwrap()).join("checkpoint"),
    );
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint-000000001", "checkpoint.lock"]);
    drop(trainer);
    assert_eq!(names(dir.path()), ["checkpoint", "checkpoint-000000001"]);
    resume(&path, config(9)).unwrap().claim(&path).unwrap();
}

/// Runs only as a child process, started by the test below.
#[test]
fn claims_and_waits_to_be_killed() {
    let Some(path) = std::env::var_os(CLAIMED).map(PathBuf::from) else { return };
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    println!("claimed");
    std::thread::sleep(Duration::from_secs(60));
}

const CLAIMED: &str = "DDPM_TEST_CLAIMS";

#[cfg(unix)]
#[test]
fn a_claim_names_its_process_and_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "claims_and_waits_to_be_killed", "--nocapture"])
        .env(CLAIMED, &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("claimed")));
    let message = new(config(9)).claim(&path).unwrap_err().to_string();
    if cfg!(unix) {
        assert!(message.contains(&format!("process {} saves here", child.id())), "{message}");
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    drop(trainer);
    assert_eq!(names(dir.path()), ["checkpoint"]);
}

#[cfg(unix)]
#[test]
fn a_run_whose_directory_is_removed_still_saves_and_warns() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let path = out.join("checkpoint");
    let mut trainer = new(config(9));
    trainer.claim(&path).unwrap();
    step_and_save(&mut trainer, &path);
    fs::remove_dir_all(&out).unwrap();
    let warnings = step_and_save(&mut trainer, &path).warnings;
    let [Error::Vanished { path: found }] = warnings.as_slice() else { panic!("{warnings:?}") };
    assert_eq!(*found, out);
    assert_eq!(Checkpoint::open(&path).unwrap().step(), 2);
    assert!(step_and_save(&mut trainer, &path).warnings.is_empty());
    // The claim is effective again.
    assert!(matches!(new(config(9)).claim(&path), Err(Error::Locked { .. })));
}

#[test]
fn sampler_settings_are_saved_with_the_run() {
    let (_dir, path) = saved();
    let usual = Checkpoint::open(&path).unwrap();
    assert_eq!((usual.sampling(), usual.sampler().unwrap().timesteps().len()), (None, 50));

    let sampling = SamplerConfig::new(Solver::Ddim { eta: 1.0 }, 7);
    let mut trainer = resume(&path, config(9)).unwrap();
    let message =
        trainer.set_sampling(SamplerConfig::new(sampling.solver, 0)).unwrap_err().to_string();
    assert!(message.starts_with("sampling steps is 0; it must be from 1 to 1000"), "{message}");
    trainer.set_sampling(sampling).unwrap();
    trainer.save(&path).unwrap();
    step_and_save(&mut resume(&path, config(9)).unwrap(), &path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.sampling(), Some(&sampling));
    let [ours, theirs] =
        [checkpoint.sampler().unwrap(), sampling.sampler(&Diffusion::ddpm()).unwrap()];
    assert_eq!(format!("{ours:?}"), format!("{theirs:?}"));
}

#[test]
fn weights_that_are_not_finite_are_not_saved() {
    let (dir, path) = saved();
    let mut trainer = resume(&path, config(9)).unwrap();
    step_and_save(&mut trainer, &path);
    let before = snapshot(dir.path());
    let bias = &trainer.vars()["out_conv.bias"];
    bias.set(&Tensor::new(&[f32::INFINITY], &Device::Cpu).unwrap()).unwrap();
    let message = trainer.save(&path).map(drop).unwrap_err().to_string();
    assert!(
        message.starts_with("weight out_conv.bias is inf at step 3; nothing was saved"),
        "{message}"
    );
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn a_run_ends_before_its_steps_have_no_more_random_numbers() {
    let (_dir, path) = saved();
    edit(&path, |json| json["step"] = ((1u64 << 40) - 1).into());
    let mut trainer = resume(&path, config(u64::MAX)).unwrap();
    let message = trainer.fit(&Waves(11), &mut ()).unwrap_err().to_string();
    assert!(message.starts_with("step is 1099511627775; it must be less than"), "{message}");
    trainer.save(&path).unwrap();
    Checkpoint::open(&path).unwrap();
}

/// The environment variable of the process that the test below kills.
const VICTIM: &str = "DDPM_TEST_SAVES_UNTIL_KILLED";

/// Saves as fast as possible, and prints when a save begins and what it saved. Runs only as a child process.
#[test]
fn saves_until_killed() {
    let Some(path) = std::env::var_os(VICTIM).map(PathBuf::from) else { return };
    let mut trainer = match Checkpoint::open(&path) {
        Ok(_) => resume(&path, config(u64::MAX)).unwrap(),
        Err(_) => new(config(u64::MAX)),
    };
    loop {
        let batch = trainer.next_batch(&Waves(11)).unwrap();
        trainer.step(&batch).unwrap();
        println!("saving");
        trainer.save(&path).unwrap();
        println!("saved {}", trainer.steps());
    }
}

#[test]
fn killed_at_any_moment_a_run_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let (mut last, mut within, mut between) = (0, 0, 0);
    for round in 0..50 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "saves_until_killed", "--nocapture", "--test-threads=1"])
            .env(VICTIM, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let step_of = |line: &str| line.split_once("saved ")?.1.parse::<u64>().ok();
        let begins = |lines: &mut Lines<_>| lines.any(|line| line.unwrap().ends_with("saving"));
        // The first save shows how long a save takes. Then the child is killed at a random moment, most
        // likely within a save.
        assert!(begins(&mut lines), "round {round}: a first save");
        let start = Instant::now();
        let first = lines.by_ref().find_map(|line| step_of(&line.unwrap())).expect("a first save");
        let duration = start.elapsed();
        assert!(begins(&mut lines), "round {round}: a second save");
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(duration.mul_f64((random % 1000) as f64 / 800.0));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        let printed = lines.filter_map(|line| step_of(&line.ok()?)).last().unwrap_or(first);

        within += usize::from(dir.path().join("checkpoint.saving").exists());
        between += usize::from(!path.exists());
        let trainer =
            resume(&path, config(u64::MAX)).unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert!(first > last, "round {round}: {first} after {last}");
        assert!(trainer.steps() >= printed, "round {round}: {} after {printed}", trainer.steps());
        last = printed;
        // Leftovers are removed by the next child, or by the test.
        if round % 2 == 1 {
            trainer.save(&path).unwrap();
            let aside = format!("checkpoint-{:09}", trainer.steps());
            assert_eq!(names(dir.path()), ["checkpoint", aside.as_str()], "round {round}");
        }
    }
    println!("{last} steps saved; killed {within} times in a save, {between} between its renames");
    assert!(within >= 10, "killed only {within} times in a save");
}
