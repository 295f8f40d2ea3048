//! NCCL and the CUDA driver, found at run time: nothing is linked, and no header is needed to
//! build.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::{NonNull, null, null_mut};

use super::ffi::{
    AllGather, AllReduce, Broadcast, Code, Comm, CopyAsync, DRIVER_SUCCESS, DriverCode,
    GetAsyncError, GetDevice, GetDeviceName, GetDriverError, GetErrorString, GetLastError,
    GetNumber, GetUniqueId, GetVersion, Handle, IN_PROGRESS, Init, InitRank, Message, NOT_READY,
    OnComm, OnGroup, Query, Reduce, SUCCESS, UNIQUE_ID_BYTES, UniqueId, VERSION_MIN,
};
use super::{NcclError, Work};

/// Which files the libraries are, or by which names the system knows them.
#[derive(Clone, Debug)]
pub struct Paths {
    /// NCCL.
    pub nccl: PathBuf,
    /// The CUDA driver.
    pub driver: PathBuf,
}

impl Default for Paths {
    /// The names under which both are installed.
    fn default() -> Paths {
        Paths { nccl: "libnccl.so.2".into(), driver: "libcuda.so.1".into() }
    }
}

/// NCCL and the driver, open. They are never closed, for they have threads and exit handlers of
/// their own; opening them again costs nothing.
#[derive(Clone, Copy)]
pub struct Nccl {
    pub(super) library: Library,
    pub(super) driver: Driver,
}

impl Nccl {
    /// Opens both.
    pub fn open(paths: &Paths) -> Result<Nccl, NcclError> {
        Ok(Nccl { library: Library::open(&paths.nccl)?, driver: Driver::open(&paths.driver)? })
    }
}

/// NCCL's functions.
#[derive(Clone, Copy)]
pub(super) struct Library {
    /// Major times 10,000, minor times 100, patch.
    pub version: c_int,
    get_unique_id: GetUniqueId,
    pub init_rank: InitRank,
    pub finalize: OnComm,
    pub destroy: OnComm,
    pub abort: OnComm,
    async_error: GetAsyncError,
    error_string: GetErrorString,
    last_error: GetLastError,
    pub group_start: OnGroup,
    pub group_end: OnGroup,
    pub all_reduce: AllReduce,
    pub reduce: Reduce,
    pub reduce_scatter: AllReduce,
    pub all_gather: AllGather,
    pub broadcast: Broadcast,
    pub send: Message,
    pub receive: Message,
}

impl Library {
    pub fn open(path: &Path) -> Result<Library, NcclError> {
        let object = Object::open(path, INSTALL_NCCL)?;
        // SAFETY: these symbols are functions of these types in every version from 2.14 on, as
        // `nccl.h` declares them; an earlier one lacks some, and its version is refused below.
        let library = unsafe {
            let get_version: GetVersion = object.function(c"ncclGetVersion")?;
            let mut version = 0;
            let code = get_version(&mut version);
            if code != SUCCESS || version < VERSION_MIN {
                let why = format!("{} is too old; {INSTALL_NCCL}", words_of(version));
                return Err(NcclError::Absent { library: object.name, why });
            }
            Library {
                version,
                get_unique_id: object.function(c"ncclGetUniqueId")?,
                init_rank: object.function(c"ncclCommInitRankConfig")?,
                finalize: object.function(c"ncclCommFinalize")?,
                destroy: object.function(c"ncclCommDestroy")?,
                abort: object.function(c"ncclCommAbort")?,
                async_error: object.function(c"ncclCommGetAsyncError")?,
                error_string: object.function(c"ncclGetErrorString")?,
                last_error: object.function(c"ncclGetLastError")?,
                group_start: object.function(c"ncclGroupStart")?,
                group_end: object.function(c"ncclGroupEnd")?,
                all_reduce: object.function(c"ncclAllReduce")?,
                reduce: object.function(c"ncclReduce")?,
                reduce_scatter: object.function(c"ncclReduceScatter")?,
                all_gather: object.function(c"ncclAllGather")?,
                broadcast: object.function(c"ncclBroadcast")?,
                send: object.function(c"ncclSend")?,
                receive: object.function(c"ncclRecv")?,
            }
        };
        Ok(library)
    }

    /// A name for a communicator to come.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId { internal: [0; UNIQUE_ID_BYTES] };
        // SAFETY: the result is written once.
        let code = unsafe { (self.get_unique_id)(&mut id) };
        self.check("ncclGetUniqueId", code, None).map(|_| id)
    }

    /// Whether a communicator is done with the last call, which says nothing of the stream.
    pub fn state(&self, comm: Handle) -> Result<bool, Failure> {
        let mut state = SUCCESS;
        // SAFETY: the caller's communicator is open, and only its holder calls this.
        let code = unsafe { (self.async_error)(comm.as_ptr(), &mut state) };
        self.judge("ncclCommGetAsyncError", code, Some(comm))?;
        self.judge("a call", state, Some(comm))
    }

    /// Whether a call is over that came to `code`, or goes on; else what was wrong.
    pub fn judge(&self, what: &str, code: Code, comm: Option<Handle>) -> Result<bool, Failure> {
        match code {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            _ => Err(Failure { code, text: self.words(what, code, comm) }),
        }
    }

    fn check(&self, what: &str, code: Code, comm: Option<Handle>) -> Result<bool, NcclError> {
        self.judge(what, code, comm).map_err(|failure| NcclError::Call(failure.text))
    }

    fn words(&self, what: &str, code: Code, comm: Option<Handle>) -> String {
        let comm: Comm = comm.map_or(null_mut(), Handle::as_ptr);
        // SAFETY: the first function takes any number; the second an open communicator or none.
        // Both return strings that live until the next call on this thread, or for ever.
        let (kind, last) =
            unsafe { (text((self.error_string)(code)), text((self.last_error)(comm))) };
        let last = last.trim();
        let last = if last.is_empty() { String::new() } else { format!(" ({last})") };
        format!("NCCL {}, {what}: {kind}{last}", words_of(self.version))
    }
}

/// What NCCL says that went wrong.
pub(super) struct Failure {
    pub code: Code,
    pub text: String,
}

/// A version in words.
pub(super) fn words_of(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// The driver's functions.
#[derive(Clone, Copy)]
pub(super) struct Driver {
    init: Init,
    get_version: GetNumber,
    get_count: GetNumber,
    get_device: GetDevice,
    get_name: GetDeviceName,
    error_string: GetDriverError,
    stream_query: Query,
    event_query: Query,
    pub copy_2d: CopyAsync,
}

impl Driver {
    pub fn open(path: &Path) -> Result<Driver, NcclError> {
        let object = Object::open(path, "it comes with NVIDIA's driver")?;
        // SAFETY: these symbols are functions of these types in every driver of CUDA 11 and newer.
        unsafe {
            Ok(Driver {
                init: object.function(c"cuInit")?,
                get_version: object.function(c"cuDriverGetVersion")?,
                get_count: object.function(c"cuDeviceGetCount")?,
                get_device: object.function(c"cuDeviceGet")?,
                get_name: object.function(c"cuDeviceGetName")?,
                error_string: object.function(c"cuGetErrorString")?,
                stream_query: object.function(c"cuStreamQuery")?,
                event_query: object.function(c"cuEventQuery")?,
                copy_2d: object.function(c"cuMemcpy2DAsync_v2")?,
            })
        }
    }

    /// The names of all devices, and the version of CUDA that the driver knows: major times 1,000,
    /// minor times 10.
    pub fn devices(&self) -> Result<(c_int, Vec<String>), NcclError> {
        let (mut version, mut count) = (0, 0);
        // SAFETY: the driver is initialised first; each result is written once.
        unsafe {
            self.check("cuInit", (self.init)(0))?;
            self.check("cuDriverGetVersion", (self.get_version)(&mut version))?;
            self.check("cuDeviceGetCount", (self.get_count)(&mut count))?;
        }
        let names: Result<_, _> = (0..count).map(|ordinal| self.name(ordinal)).collect();
        Ok((version, names?))
    }

    fn name(&self, ordinal: c_int) -> Result<String, NcclError> {
        const BYTES: usize = 256;
        let (mut device, mut name) = (0, [0; BYTES]);
        // SAFETY: the driver is initialised; it writes a C string of at most so many bytes.
        unsafe {
            self.check("cuDeviceGet", (self.get_device)(&mut device, ordinal))?;
            let code = (self.get_name)(name.as_mut_ptr(), BYTES as c_int, device);
            self.check("cuDeviceGetName", code)?;
            Ok(text(name.as_ptr()))
        }
    }

    /// Whether the work on a stream, or before an event, is done.
    pub fn query(&self, work: Work) -> Result<bool, NcclError> {
        // SAFETY: who made the stream or event said that it lives.
        let (what, code) = unsafe {
            match work {
                Work::Stream(stream) => ("cuStreamQuery", (self.stream_query)(stream.0)),
                Work::Event(event) => ("cuEventQuery", (self.event_query)(event.0)),
            }
        };
        if code == NOT_READY {
            return Ok(false);
        }
        self.check(what, code).map(|()| true)
    }

    pub fn check(&self, what: &str, code: DriverCode) -> Result<(), NcclError> {
        if code == DRIVER_SUCCESS {
            return Ok(());
        }
        let mut words = null();
        // SAFETY: the result is written once, with a string that lives for ever, or null.
        let words = unsafe {
            (self.error_string)(code, &mut words);
            text(words)
        };
        Err(NcclError::Call(format!("CUDA's driver, {what}: error {code}, {words}")))
    }
}

const INSTALL_NCCL: &str = "install libnccl2, or nvidia-nccl-cu12 by pip with its folder in \
                            LD_LIBRARY_PATH, 2.14 or newer";

/// A library that was opened.
struct Object {
    handle: NonNull<c_void>,
    name: String,
}

impl Object {
    fn open(path: &Path, what_to_do: &str) -> Result<Object, NcclError> {
        let name = path.display().to_string();
        let absent = |why: String| NcclError::Absent { library: name.clone(), why };
        let path = CString::new(path.as_os_str().as_bytes());
        let path = path.map_err(|_| absent("the path has a zero byte".into()))?;
        // SAFETY: the path is a C string; the library's initialisers do not depend on ours.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        match NonNull::new(handle) {
            Some(handle) => Ok(Object { handle, name }),
            None => {
                // SAFETY: what it returns lives until the next call of its kind on this thread.
                let why = unsafe { text(libc::dlerror()) };
                Err(absent(format!("{why}; {what_to_do}")))
            }
        }
    }

    /// # Safety
    ///
    /// `F` is a type of functions, and the one that has this name is of that type.
    unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F, NcclError> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // SAFETY: the handle is open, the name is a C string.
        let symbol = unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) };
        let Some(symbol) = NonNull::new(symbol) else {
            let why = format!("it has no {}: another version is needed", name.to_string_lossy());
            return Err(NcclError::Absent { library: self.name.clone(), why });
        };
        // SAFETY: a function's address, of as many bytes; the type is the caller's promise.
        Ok(unsafe { std::mem::transmute_copy(&symbol) })
    }
}

/// A C string, or nothing.
///
/// # Safety
///
/// The string ends with a zero and lives for as long as this takes, or the pointer is null.
unsafe fn text(words: *const c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: the caller's.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}
