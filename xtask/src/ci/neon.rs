//! The kernels of arm64 on a machine that is none: built for it, and run in an emulator.
//!
//! Where the toolchain at hand has no standard library for arm64, Debian's is taken, and the
//! compiler that goes with it. Both lie below `target`, and the compiler is run by a loader of its
//! own, with libraries of its own: nothing of the system changes.

use std::env::consts::ARCH;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::workshop::{Workshop, install, is_there, run};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64-static";
/// Where the C library for arm64 is that programs run with.
const LIBRARIES: &str = "/usr/aarch64-linux-gnu";
/// What brings these.
const PACKAGES: &[&str] = &["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "qemu-user-static"];
/// The first release of Debian whose compiler is new enough.
const SUITE: &str = "forky";
const MIRROR: &str = "http://deb.debian.org/debian";
/// Signatures are checked with these keys; they come with Debian, and with what descends from it.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Tests of the kernels on a machine with dot products, and those of products on one without.
pub fn test(shop: &Workshop) -> Result<()> {
    if ARCH == "aarch64" {
        println!("SKIPPED: this machine is arm64, and runs all tests itself");
        return Ok(());
    }
    // A compiler that cannot be had today says nothing of the code.
    let compiler = match prepare(shop) {
        Ok(compiler) => compiler,
        Err(error) => {
            println!("SKIPPED: what tests on arm64 need: {error:#}");
            return Ok(());
        }
    };
    for (machine, filter) in [("max", ""), ("cortex-a53", "of_several_jobs")] {
        println!("a machine as qemu has it: {machine}");
        let cargo = std::env::var_os("CARGO").context("start this by `cargo xtask`")?;
        let mut command = shop.command(cargo);
        command.args(["test", "--locked", "--package", "pomona-kernels", "--lib"]);
        // What only helps to build is not worth its optimisation.
        command.args(["--target", TARGET, "--config", "profile.dev.package.'*'.opt-level=0"]);
        command.args(["--config", "profile.dev.debug=false", filter]);
        command.env("RUSTC", &compiler).env("CARGO_TARGET_DIR", folder(shop).join("build"));
        command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER);
        let runner = format!("{EMULATOR} -cpu {machine} -L {LIBRARIES}");
        run(command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", runner))?;
    }
    Ok(())
}

fn folder(shop: &Workshop) -> PathBuf {
    shop.target.join("ci-neon")
}

/// Installs what is missing; returns the compiler.
fn prepare(shop: &Workshop) -> Result<OsString> {
    let has_libraries = Path::new(LIBRARIES).join("lib/libc.so").exists();
    if !(is_there(LINKER, "--version") && has_libraries && is_there(EMULATOR, "--version")) {
        for package in PACKAGES {
            install(shop, package)?;
        }
    }
    let own = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let words = ["--print", "target-libdir", "--target", TARGET];
    let libraries = shop.command(&own).args(words).output().context("cannot run rustc")?;
    if Path::new(String::from_utf8_lossy(&libraries.stdout).trim()).is_dir() {
        return Ok(own);
    }
    ensure!(
        ARCH == "x86_64" && is_there("apt-get", "--version") && Path::new(KEYS).exists(),
        "this toolchain cannot build for arm64: `rustup target add {TARGET}`"
    );
    let compiler = folder(shop).join("rustc");
    if !compiler.exists() {
        fetch(shop, &compiler).context("cannot take Debian's compiler")?;
    }
    Ok(compiler.into())
}

/// Fetches a compiler for this machine with the standard libraries of both, and writes a program
/// that starts it.
fn fetch(shop: &Workshop, compiler: &Path) -> Result<()> {
    let (apt, root) = (folder(shop).join("apt"), folder(shop).join("root"));
    let archives = apt.join("archives");
    fs::create_dir_all(apt.join("lists/partial"))?;
    fs::create_dir_all(archives.join("partial"))?;
    fs::create_dir_all(&root)?;
    fs::write(apt.join("sources.list"), format!("deb [signed-by={KEYS}] {MIRROR} {SUITE} main\n"))?;
    // What the compiler needs and is not to be fetched: it will use what is installed.
    let here = ["gcc", "libc6-dev", "binutils"].map(|name| {
        format!(
            "Package: {name}\nStatus: install ok installed\nVersion: 999\nProvides: libc-dev\n\
             Architecture: amd64\nMaintainer: none\nDescription: is there\n\n"
        )
    });
    fs::write(apt.join("status"), here.concat())?;
    run(apt_get(shop, &apt).arg("update"))?;
    let install = ["install", "--yes", "--download-only", "--no-install-recommends", "rustc"];
    run(apt_get(shop, &apt).args(install))?;
    let download = ["download", "libstd-rust-dev:arm64"];
    run(apt_get(shop, &apt).args(download).current_dir(&archives))?;
    for entry in fs::read_dir(&archives)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(shop.command("dpkg-deb").arg("--extract").arg(path).arg(&root))?;
        }
    }
    fs::remove_dir_all(&apt)?;
    let usr = root.join("usr");
    let usr = usr.display();
    let script = format!(
        "#!/bin/sh\nexec '{usr}/lib64/ld-linux-x86-64.so.2' --library-path \
         '{usr}/lib/x86_64-linux-gnu' '{usr}/bin/rustc' --sysroot '{usr}' \"$@\"\n"
    );
    fs::write(compiler, script)?;
    fs::set_permissions(compiler, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// `apt-get` in a world of its own in the folder `apt`.
fn apt_get(shop: &Workshop, apt: &Path) -> Command {
    let at = |name: &str| apt.join(name).display().to_string();
    let mut command = shop.command("apt-get");
    command.arg("--quiet=2");
    for (option, value) in [
        ("APT::Architecture", "amd64".to_owned()),
        ("APT::Architectures::", "amd64".to_owned()),
        ("APT::Architectures::", "arm64".to_owned()),
        ("APT::Sandbox::User", "root".to_owned()),
        ("Acquire::Languages", "none".to_owned()),
        // A mirror may stand still. Signatures are checked all the same.
        ("Acquire::Check-Valid-Until", "false".to_owned()),
        ("Dir::Etc::sourcelist", at("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
        ("Dir::Etc::preferencesparts", "/dev/null".to_owned()),
        ("Dir::State", at("")),
        ("Dir::State::lists", at("lists")),
        ("Dir::State::status", at("status")),
        ("Dir::Cache", at("")),
        ("Dir::Cache::archives", at("archives")),
        ("Debug::NoLocking", "true".to_owned()),
    ] {
        command.arg("--option").arg(format!("{option}={value}"));
    }
    command
}
