//! The structure of `src`, derived from its `use` lines and paths: files have no circular dependencies, and
//! dependencies follow the order in docs/architecture.md. Code of tests is not included.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A file of `src`: its module path, such as `["kernels", "cpu", "gemm"]`, and its code without comments and tests.
struct Source {
    file: PathBuf,
    module: Vec<String>,
    code: String,
    /// The whole file.
    text: String,
    /// Number of lines, without those of tests.
    lines: usize,
}

/// Files that re-export others for users, and files of tests. No module depends on them.
const FRONT: [&str; 4] = ["lib.rs", "nn.rs", "docs.rs", "random_inputs.rs"];

fn sources() -> Vec<Source> {
    fn visit(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a directory of src") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    visit(&src, &mut files);
    files.sort();
    let mut sources = Vec::new();
    for path in files {
        let file = path.strip_prefix(&src).expect("a file of src").to_path_buf();
        let tests = file.file_stem().is_some_and(|stem| stem == "tests")
            || file.starts_with("kernels/suite");
        if tests || FRONT.iter().any(|front| file == Path::new(front)) {
            continue;
        }
        let mut module: Vec<String> = file
            .with_extension("")
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        if module.last().is_some_and(|last| last == "mod") {
            module.pop();
        }
        let text = fs::read_to_string(&path).expect("a readable file");
        let (code, lines) = code_of(&text);
        sources.push(Source { file, module, code, text, lines });
    }
    sources
}

/// Returns the code without comments and without items under `#[cfg(test)]`, and the number of lines without these
/// items.
fn code_of(text: &str) -> (String, usize) {
    let (mut code, mut count, mut inline) = (String::new(), 0, false);
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let trimmed = line.trim_start();
        if trimmed.starts_with("#[cfg(test)]") {
            // rustfmt ends an item with a line of its own indentation.
            let indent = &line[..line.len() - trimmed.len()];
            for line in lines.by_ref() {
                let rest = line.strip_prefix(indent).unwrap_or(line);
                let ends = rest.starts_with('}') || rest.ends_with(';') && !rest.starts_with(' ');
                if ends && !rest.starts_with("#[") {
                    break;
                }
            }
            continue;
        }
        count += 1;
        if trimmed.starts_with("//") {
            continue;
        }
        // Within an inline module, `super` is this file.
        let module = line.starts_with("mod ") || line.starts_with("pub mod ");
        inline = line != "}" && (inline || module && line.ends_with('{'));
        let line = line.split(" // ").next().unwrap_or(line);
        code += &if inline { line.replace("super::", "self::") } else { line.to_string() };
        code.push('\n');
    }
    (code, count)
}

/// Returns the paths of `use` declarations, with braces expanded, and other paths that begin with `crate::`.
fn paths(code: &str) -> Vec<Vec<String>> {
    fn expand(prefix: &[String], tree: &str, found: &mut Vec<Vec<String>>) {
        let tree = tree.trim();
        if let Some((head, group)) = tree.split_once('{') {
            let mut prefix = prefix.to_vec();
            prefix.extend(
                head.split("::").map(str::trim).filter(|s| !s.is_empty()).map(String::from),
            );
            let (mut depth, mut item) = (0, String::new());
            for c in group.chars() {
                match c {
                    '}' if depth == 0 => break,
                    ',' if depth == 0 => expand(&prefix, &std::mem::take(&mut item), found),
                    _ => {
                        depth += i32::from(c == '{') - i32::from(c == '}');
                        item.push(c);
                    }
                }
            }
            expand(&prefix, &item, found);
        } else if !tree.is_empty() {
            let name = tree.split(" as ").next().unwrap_or(tree);
            let mut path = prefix.to_vec();
            path.extend(name.split("::").map(|part| part.trim().to_string()));
            found.push(path);
        }
    }
    let mut found = Vec::new();
    for (start, _) in code.match_indices("use ") {
        let before = code[..start].chars().next_back();
        if before.is_none_or(|c| c.is_whitespace() || c == ')') {
            let tree = &code[start + 4..];
            expand(&[], &tree[..tree.find(';').unwrap_or(0)], &mut found);
        }
    }
    for (start, _) in code.match_indices("crate::") {
        if code[..start].ends_with("(in ") {
            continue;
        }
        let path = code[start..].split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
        let path = path.into_iter().next().unwrap_or_default();
        found.push(path.split("::").filter(|s| !s.is_empty()).map(String::from).collect());
    }
    found
}

/// Returns the files on which each file depends, as indices.
fn dependencies(sources: &[Source]) -> Vec<BTreeSet<usize>> {
    let index: BTreeMap<&[String], usize> =
        sources.iter().enumerate().map(|(i, source)| (&source.module[..], i)).collect();
    let of = |i: usize| {
        let source = &sources[i];
        let mut found = BTreeSet::new();
        for path in paths(&source.code) {
            let mut base = match path.first().map(String::as_str) {
                Some("crate") => {
                    let top = path.get(1).is_some_and(|top| index.keys().any(|m| m[0] == *top));
                    let named = source.file.display();
                    assert!(top || path.len() == 1, "{named} imports {path:?} through the root");
                    vec![]
                }
                Some("self" | "super") => source.module.clone(),
                // A child module, or another crate.
                _ => {
                    let mut child = source.module.clone();
                    child.extend(path.first().cloned());
                    if !index.contains_key(&child[..]) {
                        continue;
                    }
                    source.module.clone()
                }
            };
            for part in path {
                match part.as_str() {
                    "crate" | "self" => {}
                    "super" => drop(base.pop()),
                    _ => base.push(part),
                }
            }
            // The longest part of the path that is a file; the rest is an item in it.
            let file = (1..=base.len()).rev().find_map(|len| index.get(&base[..len]));
            if let Some(&file) = file.filter(|&&file| file != i) {
                found.insert(file);
            }
        }
        found
    };
    (0..sources.len()).map(of).collect()
}

#[test]
fn no_file_depends_on_itself_through_others() {
    let sources = sources();
    let edges = dependencies(&sources);
    assert!(edges.iter().map(BTreeSet::len).sum::<usize>() > 100, "{edges:?}");
    // Returns the files that a file reaches through its dependencies.
    let reached = |from: usize| {
        let (mut reached, mut open) = (BTreeSet::new(), vec![from]);
        while let Some(file) = open.pop() {
            open.extend(edges[file].iter().filter(|&&to| reached.insert(to)));
        }
        reached
    };
    let reached: Vec<_> = (0..sources.len()).map(reached).collect();
    let circles: Vec<String> = (0..sources.len())
        .filter(|&i| reached[i].contains(&i))
        .map(|i| {
            let to = edges[i].iter().filter(|&&j| reached[j].contains(&i));
            let to: Vec<_> = to.map(|&j| sources[j].file.display().to_string()).collect();
            format!("{} -> {}", sources[i].file.display(), to.join(", "))
        })
        .collect();
    assert!(circles.is_empty(), "circles among files:\n{}", circles.join("\n"));
}

#[test]
fn dependencies_point_in_the_drawn_direction() {
    let chapter = include_str!("../docs/architecture.md");
    let drawn = chapter.lines().find(|line| line.contains(" → ") && !line.contains('`'));
    let drawn = drawn.expect("a drawing of the dependencies in docs/architecture.md");
    let level: BTreeMap<&str, usize> = drawn
        .split(" → ")
        .enumerate()
        .flat_map(|(level, names)| names.split(", ").map(move |name| (name.trim(), level)))
        .collect();
    let sources = sources();
    let mut wrong = Vec::new();
    for (from, found) in sources.iter().zip(dependencies(&sources)) {
        let Some(own) = level.get(&*from.module[0]) else {
            wrong.push(format!("{} is not in the drawing", from.file.display()));
            continue;
        };
        for to in found {
            let to = &sources[to];
            let below = level.get(&*to.module[0]).is_some_and(|level| own < level);
            if from.module[0] != to.module[0] && !below {
                wrong.push(format!("{} depends on {}", from.file.display(), to.file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "not as drawn:\n{}", wrong.join("\n"));
}

#[test]
fn one_place_knows_the_devices() {
    let places = ["backend", "kernels/cuda"];
    let wrong: Vec<String> = sources()
        .iter()
        .filter(|source| !places.iter().any(|place| source.file.starts_with(place)))
        .map(|source| (source.text.matches("feature = \"cuda\"").count(), source))
        .filter(|&(count, _)| count > 0)
        .map(|(count, source)| format!("{}: {count} times", source.file.display()))
        .collect();
    assert!(wrong.is_empty(), "feature = \"cuda\" outside {places:?}:\n{}", wrong.join("\n"));
}

#[test]
fn files_are_short_enough_to_read_in_one_sitting() {
    let long: Vec<String> = sources()
        .iter()
        .filter(|source| source.lines > 450)
        .map(|source| format!("{}: {} lines", source.file.display(), source.lines))
        .collect();
    assert!(long.is_empty(), "more than 450 lines without tests:\n{}", long.join("\n"));
}
