//! The stand-in for NCCL and CUDA's driver, compiled from `fake.c` when it is first asked for.

use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use pomona_fabric::nccl::Paths;

use super::device::function;

/// A job that hangs or fails.
pub struct Fault {
    /// Whose.
    pub rank: usize,
    /// What the communicator's state becomes; zero for nothing.
    pub code: c_int,
    /// Which of its jobs, from 0 on.
    pub job: usize,
}

/// The stand-in, as it is at the beginning.
pub struct Fake {
    path: PathBuf,
}

/// Compiles the stand-in, unless this process has done so. Other processes may have it open: they
/// keep the file that they know.
fn compile(name: &str, flags: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (path, fresh) = (folder.join(name), folder.join(format!("{name}.{}", std::process::id())));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nccl/fake.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-Wall", "-pthread"]).args(flags);
    let output = compiler.arg("-o").arg(&fresh).arg(source).args(["-lrt"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(fresh, &path).unwrap();
    path
}

/// Where a rank in a process of its own finds it.
pub fn paths() -> Paths {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libfake-nccl.so");
    Paths { nccl: path.clone(), driver: path }
}

/// One that lacks a function, or has an old version.
pub fn variant(flag: &str) -> PathBuf {
    compile(&format!("libfake{flag}.so"), &[flag])
}

impl Fake {
    pub fn new() -> Fake {
        static COMPILED: OnceLock<PathBuf> = OnceLock::new();
        let path = COMPILED.get_or_init(|| compile("libfake-nccl.so", &[])).clone();
        let fake = Fake { path };
        let reset: unsafe extern "C" fn() = fake.function("fake_reset");
        // SAFETY: a function of no arguments, while no rank is there.
        unsafe { reset() };
        fake
    }

    pub fn paths(&self) -> Paths {
        Paths { nccl: self.path.clone(), driver: self.path.clone() }
    }

    pub fn fault(&self, fault: Fault) {
        let arm: unsafe extern "C" fn(c_int, c_int, c_int) = self.function("fake_fault");
        // SAFETY: three numbers, while no rank is there.
        unsafe { arm(fault.rank as c_int, fault.code, fault.job as c_int) };
    }

    /// Whether communicators hang when they are aborted.
    pub fn hang_ends(&self, hang: bool) {
        let arm: unsafe extern "C" fn(c_int) = self.function("fake_hang_ends");
        // SAFETY: a number, written atomically.
        unsafe { arm(c_int::from(hang)) };
    }

    /// Communicators, streams, events and pieces of memory that there are.
    pub fn left(&self) -> usize {
        let left: unsafe extern "C" fn() -> c_int = self.function("fake_left");
        // SAFETY: it reads a number.
        unsafe { left() as usize }
    }

    /// Nothing was given to it wrongly, and nothing is left.
    pub fn check(&self) {
        let complaint: unsafe extern "C" fn() -> *const c_char = self.function("fake_complaint");
        // SAFETY: a C string, which nobody writes while no rank is there.
        let complaint = unsafe { CStr::from_ptr(complaint()) }.to_str().unwrap();
        assert_eq!(complaint, "");
        assert_eq!(self.left(), 0);
    }

    fn function<F: Copy>(&self, name: &str) -> F {
        function(&self.path, name)
    }
}
