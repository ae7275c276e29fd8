//! The structure of the source: modules depend on each other in one direction only, and each
//! foreign library is used in one place.

use std::{
    fs,
    path::{Path, PathBuf},
};

fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            // The tests at the end of a file may use everything.
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
            let code = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
            found.push((path, code));
        }
    }
    found
}

/// Whether `code` has `crate::module` anywhere, or `module` at the first level of
/// `use crate::{…};`.
fn uses(code: &str, module: &str) -> bool {
    let starts =
        |text: &str| text.trim_start().strip_prefix(module).is_some_and(|rest| rest.starts_with([':', ',', ';', '}', ' ', '\n']));
    code.split("crate::").skip(1).any(|after| {
        let Some(list) = after.strip_prefix('{') else { return starts(after) };
        let list = list.split(';').next().unwrap_or_default();
        let mut depth = 0;
        let is_first_level = |c: char| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        };
        list.split(is_first_level).any(starts)
    })
}

#[test]
fn modules_depend_on_each_other_in_one_direction() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let never = [
        ("domain", &["files", "store", "grpc", "gateway", "server", "cli", "proto", "wire", "postgres", "config", "telemetry"][..]),
        ("wire", &["files", "domain", "store", "grpc", "gateway", "server", "cli", "postgres", "config", "telemetry"]),
        ("store", &["files", "grpc", "gateway", "server", "cli", "proto", "wire", "postgres", "config"]),
        ("files", &["store", "grpc", "gateway", "server", "cli", "postgres", "config", "telemetry"]),
        ("grpc", &["files", "gateway", "server", "cli", "postgres", "config"]),
        ("gateway", &["domain", "store", "grpc", "server", "cli", "postgres", "config"]),
        ("cli", &["gateway", "grpc"]),
    ];
    for (module, forbidden) in never {
        for (path, code) in sources(&src.join(module)) {
            for other in forbidden {
                assert!(!uses(&code, other), "{} must not use {other}", path.display());
            }
        }
    }
    for (path, code) in sources(&src) {
        let inside = |module: &str| path.starts_with(src.join(module)) || path == src.join(format!("{module}.rs"));
        assert!(inside("store") || inside("postgres") || !code.contains("sqlx"), "{} uses sqlx", path.display());
        assert!(inside("gateway") || inside("server") || !code.contains("axum"), "{} uses axum", path.display());
        assert!(inside("domain") || !code.contains("psl::"), "{} uses psl", path.display());
        for foreign in ["tonic", "clap", "tokio", "http::", "hyper"] {
            assert!(!inside("files") || !code.contains(foreign), "{} uses {foreign}", path.display());
        }
        for caller in ["server", "cli"] {
            let may = inside("cli") || inside("server") || path == src.join("lib.rs") || path == src.join("main.rs");
            assert!(may || !code.contains(&format!("crate::{caller}")), "{} uses {caller}", path.display());
        }
    }
}

#[test]
fn the_gateways_errors_do_not_depend_on_its_bodies() {
    let error = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gateway/error.rs");
    let code = fs::read_to_string(error).unwrap();
    assert!(!code.contains("body::{") && !code.contains("super::body"), "gateway::error must not use gateway::body");
}
