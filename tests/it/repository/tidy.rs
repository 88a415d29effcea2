//! Rules of the source code: allowed imports, length of files, which module prints, and forbidden constructs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The modules that each module is allowed to import. ARCHITECTURE.md says why. A new arrow changes the design. Cargo keeps the
/// order of the members; this table keeps the order within `base` and within the root, and says which modules of `base` each uses.
const ALLOWED: &[(&str, &[&str])] = &[
    ("fleet", &[]),
    ("private", &[]),
    ("log_file", &["fleet", "private"]),
    ("own_log", &["fleet", "log_file"]),
    ("report", &[]),
    ("signals", &[]),
    ("sockets", &[]),
    ("span", &[]),
    ("byte_size", &[]),
    ("proxy_config", &["byte_size", "span"]),
    ("samples", &[]),
    ("web", &[]),
    ("http1", &[]),
    ("zmtp", &[]),
    ("connector", &["fleet"]),
    ("engine", &["connector", "fleet"]),
    ("slurm", &[]),
    ("machine", &["report", "slurm"]),
    (
        "profile",
        &["byte_size", "connector", "engine", "fleet", "proxy_config", "span"],
    ),
    (
        "plan",
        &[
            "connector",
            "engine",
            "fleet",
            "machine",
            "profile",
            "proxy_config",
            "slurm",
        ],
    ),
    (
        "preflight",
        &["connector", "engine", "fleet", "machine", "plan", "profile"],
    ),
    (
        "supervisor",
        &[
            "fleet", "log_file", "plan", "private", "report", "samples", "signals", "slurm", "sockets",
        ],
    ),
    (
        "proxy",
        &[
            "connector",
            "fleet",
            "http1",
            "private",
            "proxy_config",
            "report",
            "samples",
            "zmtp",
        ],
    ),
    ("control", &["fleet", "private", "report", "sockets"]),
    ("logs", &["engine", "fleet", "private", "report"]),
    ("bench", &["http1", "report", "web"]),
    ("sim", &["report", "signals", "zmtp"]),
    ("discovery", &["fleet"]),
    ("ui", &["bench", "fleet", "report"]),
    (
        "app",
        &[
            "control",
            "engine",
            "fleet",
            "logs",
            "machine",
            "plan",
            "private",
            "proxy",
            "report",
            "samples",
            "signals",
            "supervisor",
            "ui",
        ],
    ),
    (
        "cli",
        &[
            "app",
            "bench",
            "byte_size",
            "connector",
            "control",
            "discovery",
            "engine",
            "fleet",
            "logs",
            "machine",
            "own_log",
            "plan",
            "preflight",
            "private",
            "profile",
            "proxy",
            "proxy_config",
            "report",
            "signals",
            "sim",
            "slurm",
            "sockets",
            "span",
            "supervisor",
            "ui",
        ],
    ),
];

/// The folders of the proxy, from the top. A folder imports only those below it, so a completion walks in one direction.
const PROXY_FOLDERS: [&str; 8] = [
    "server",
    "canary",
    "request",
    "transfer",
    "schedule",
    "telemetry",
    "upstream",
    "body",
];

/// The maximum number of lines in a file.
const MAX_LINES: usize = 600;

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path())
    {
        if entry.is_dir() {
            found.extend(sources(&entry));
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            found.push(entry);
        }
    }
    found.sort();
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The sources below a folder of the repository, which must have some.
fn sources_below(folder: &str) -> Vec<PathBuf> {
    let found = sources(&root().join(folder));
    assert!(!found.is_empty(), "no sources below {folder}");
    found
}

/// All sources of the program and its tests.
fn code() -> Vec<PathBuf> {
    ["src", "crates", "tests"].into_iter().flat_map(sources_below).collect()
}

/// The members below `crates`.
const MEMBERS: [&str; 4] = ["base", "sim", "bench", "proxy"];

/// The path, the module, and the text of every source file. A path of the root is relative to `src`; one of a member begins with
/// the member's name instead. A member is one module, but for `base`, which has many.
fn modules() -> Vec<(String, String, String)> {
    let read = |path: &Path, folder: &Path| {
        let name = path.strip_prefix(folder).expect("below it").display().to_string();
        (name, std::fs::read_to_string(path).expect("a file"))
    };
    let first = |name: &str| {
        name.split('/')
            .next()
            .unwrap_or_default()
            .trim_end_matches(".rs")
            .to_owned()
    };
    let of_root = sources_below("src").into_iter().map(|path| {
        let (name, text) = read(&path, &root().join("src"));
        let module = first(&name);
        (name, module, text)
    });
    let of_members = MEMBERS.iter().flat_map(|member| {
        let folder = format!("crates/{member}/src");
        let files = sources_below(&folder).into_iter();
        files.map(move |path| {
            let (name, text) = read(&path, &root().join(&folder));
            let module = if *member == "base" {
                first(&name)
            } else {
                (*member).to_owned()
            };
            (format!("{member}/{name}"), module, text)
        })
    });
    of_root.chain(of_members).collect()
}

/// The top-level modules after `origin` (`crate::`) in a source text, including grouped imports.
fn imported(text: &str, origin: &str) -> Vec<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let joined = code.collect::<Vec<_>>().join("\n");
    let mut names = Vec::new();
    for rest in joined.split(origin).skip(1) {
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut name = String::new();
            for character in group.chars() {
                match character {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => names.push(std::mem::take(&mut name)),
                    _ if depth == 0 => name.push(character),
                    _ => {}
                }
            }
            names.push(name);
        } else {
            names.push(rest.to_owned());
        }
    }
    names
        .into_iter()
        .map(|name| {
            name.trim()
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                .collect::<String>()
        })
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn imports_go_down_only() {
    let table: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let (mut wrong, mut arrows) = (Vec::new(), 0);
    for (name, module, text) in modules() {
        if ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let allowed = table
            .get(module.as_str())
            .unwrap_or_else(|| panic!("`{module}` is not in the import table"));
        let is_member = MEMBERS.contains(&module.as_str());
        let origin = if is_member { "xpyd_base::" } else { "crate::" };
        for import in imported(&text, origin) {
            if import == module || !table.contains_key(import.as_str()) {
                continue;
            }
            arrows += 1;
            if !allowed.contains(&import.as_str()) {
                wrong.push(format!("{name} imports `{import}`"));
            }
        }
    }
    assert!(arrows > 0, "no imports were found");
    assert!(wrong.is_empty(), "forbidden imports:\n{}", wrong.join("\n"));
}

#[test]
fn every_member_is_checked() {
    let folders = std::fs::read_dir(root().join("crates")).expect("a folder");
    let found: BTreeSet<String> = folders
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(found, MEMBERS.map(str::to_owned).into());
}

#[test]
fn the_root_names_members_only_by_their_modules() {
    for path in sources_below("src") {
        let text = std::fs::read_to_string(&path).expect("a file");
        // The import table reads `crate::`.
        let found = MEMBERS.iter().find(|member| text.contains(&format!("xpyd_{member}::")));
        assert!(
            found.is_none() || path.ends_with("src/lib.rs"),
            "{} names the member {found:?}; import what `src/lib.rs` re-exports",
            path.display()
        );
    }
}

#[test]
fn folders_of_the_proxy_import_only_those_below_them() {
    let level = |folder: &str| PROXY_FOLDERS.iter().position(|name| *name == folder);
    let mut wrong = Vec::new();
    for (name, _, text) in modules() {
        let folder = name.strip_prefix("proxy/").and_then(|path| path.split('/').next());
        let Some(own) = folder.and_then(level) else {
            continue;
        };
        for path in text.split("crate::").skip(1) {
            let import = path.split(|c: char| !c.is_ascii_lowercase()).next().unwrap_or_default();
            if level(import).is_some_and(|other| other < own) {
                wrong.push(format!("{name} imports `{import}`"));
            }
        }
    }
    assert!(wrong.is_empty(), "imports of a folder above:\n{}", wrong.join("\n"));
}

#[test]
fn the_import_table_has_no_cycle() {
    let order: Vec<&str> = ALLOWED.iter().map(|(module, _)| *module).collect();
    for (index, (module, allowed)) in ALLOWED.iter().enumerate() {
        for import in *allowed {
            let position = order
                .iter()
                .position(|name| name == import)
                .expect("a module of the table");
            assert!(
                position < index,
                "`{module}` imports `{import}`, which is a higher layer"
            );
        }
    }
}

#[test]
fn files_are_short_and_start_with_a_doc_comment() {
    for path in code() {
        let text = std::fs::read_to_string(&path).expect("a file");
        let lines = text.lines().count();
        assert!(
            lines <= MAX_LINES,
            "{} has {lines} lines, and {MAX_LINES} are the limit",
            path.display()
        );
        assert!(text.starts_with("//!"), "{} does not begin with `//!`", path.display());
    }
}

#[test]
fn only_ui_writes_to_the_terminal() {
    // The simulated engine is a separate program whose log is its output. Four files write to a parent process, and `xpyd proxy`
    // logs to standard error.
    let exempt = [
        "sim/log.rs",
        "sim/process.rs",
        "cli/detach.rs",
        "base/own_log.rs",
        "supervisor/node/agent.rs",
        "supervisor/shim/engine.rs",
    ];
    for (name, _, text) in modules() {
        let writes = [
            "println!",
            "eprintln!",
            "print!(",
            "io::stdout()",
            "io::stderr()",
            "anstream::std",
        ];
        let found = writes.iter().find(|write| {
            text.lines()
                .any(|line| !line.trim_start().starts_with("//") && line.contains(**write))
        });
        assert!(
            found.is_none() || name.starts_with("ui/") || exempt.contains(&name.as_str()),
            "{name} uses {found:?}; print through `ui::Printer`"
        );
    }
}

#[test]
fn tests_do_not_sleep() {
    for path in sources_below("tests") {
        let text = std::fs::read_to_string(&path).expect("a file");
        // Split, so that the search does not find this line.
        for sleep in [concat!("thread::", "sleep("), concat!("time::", "sleep(")] {
            assert!(
                !text.contains(sleep),
                "{} sleeps: wait for a condition with a deadline instead",
                path.display()
            );
        }
    }
}

#[test]
fn no_local_paths_are_committed() {
    let own = concat!("/wo", "rk/");
    let files = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "STYLE.md",
        "SECURITY.md",
        "Cargo.toml",
    ];
    let pages = ["docs", "docs/design"].map(|folder| std::fs::read_dir(root().join(folder)).expect("a folder"));
    let pages = pages
        .into_iter()
        .flatten()
        .flatten()
        .filter(|page| page.path().is_file());
    let named = files
        .iter()
        .map(|name| root().join(name))
        .chain(pages.map(|page| page.path()));
    for path in named.chain(code()) {
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(!text.contains(own), "{} names a path of one machine", path.display());
    }
}

#[test]
fn logs_contain_no_rust_debug_output() {
    for (name, _, text) in modules() {
        let dumps = text.split("tracing::").skip(1).filter(|call| {
            let is_read = ["info!(", "warn!(", "error!("]
                .iter()
                .any(|level| call.starts_with(level));
            let arguments = call.split(");").next().unwrap_or_default();
            // `?value` or `name = ?value` among the fields, which come before the message.
            let fields = arguments.split('"').next().unwrap_or_default();
            is_read && fields.contains('?')
        });
        assert_eq!(
            dumps.count(),
            0,
            "{name} writes a value with `?` into a log that people read: `%` writes its words"
        );
    }
}
