//! As much of NCCL's and the CUDA driver's interfaces as is used: NCCL's as `nccl.h` has it since
//! 2.14 (2.18.3 and 2.32.3 were compared with this, by `tools/nccl/layout.c`), the driver's as
//! `cuda.h` has it since CUDA 11.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// `NCCL_VERSION(2, 14, 0)`: the least version that has communicators which do not block.
pub(super) const VERSION_MIN: c_int = 21400;

/// `ncclResult_t`.
pub(super) type Code = c_int;
pub(super) const SUCCESS: Code = 0;
pub(super) const SYSTEM_ERROR: Code = 2;
pub(super) const REMOTE_ERROR: Code = 6;
pub(super) const IN_PROGRESS: Code = 7;

/// `ncclSum`.
pub(super) const SUM: c_int = 0;

/// `NCCL_UNIQUE_ID_BYTES`.
pub(super) const UNIQUE_ID_BYTES: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId {
    pub internal: [u8; UNIQUE_ID_BYTES],
}

/// `ncclComm`, which is the library's.
#[repr(C)]
pub(super) struct Opaque {
    _private: [u8; 0],
}

pub(super) type Comm = *mut Opaque;
/// A communicator that is there.
pub(super) type Handle = std::ptr::NonNull<Opaque>;
pub(super) type StreamHandle = *mut c_void;

/// `ncclConfig_t` as 2.14 had it, which later libraries accept: the version says which fields there
/// are, and the others get the library's own choice, that of cooperative thread arrays among them.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    /// 2.14 had padding here. Later versions have a field, and leave this value to the library.
    undefined: c_int,
}

impl Config {
    /// A communicator that does not block.
    pub fn new() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: VERSION_MIN as c_uint,
            blocking: 0,
            undefined: c_int::MIN,
        }
    }
}

const _: () = assert!(size_of::<Config>() == 24 && size_of::<UniqueId>() == 128);

pub(super) type GetVersion = unsafe extern "C" fn(*mut c_int) -> Code;
pub(super) type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> Code;
pub(super) type InitRank =
    unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> Code;
pub(super) type OnComm = unsafe extern "C" fn(Comm) -> Code;
pub(super) type GetAsyncError = unsafe extern "C" fn(Comm, *mut Code) -> Code;
pub(super) type GetErrorString = unsafe extern "C" fn(Code) -> *const c_char;
pub(super) type GetLastError = unsafe extern "C" fn(Comm) -> *const c_char;
pub(super) type OnGroup = unsafe extern "C" fn() -> Code;
/// From, to, count, type, operation.
pub(super) type AllReduce =
    unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Comm, StreamHandle) -> Code;
/// From, to, count, type, operation, root.
pub(super) type Reduce =
    unsafe extern "C" fn(u64, u64, usize, c_int, c_int, c_int, Comm, StreamHandle) -> Code;
/// From, to, count, type.
pub(super) type AllGather =
    unsafe extern "C" fn(u64, u64, usize, c_int, Comm, StreamHandle) -> Code;
/// From, to, count, type, root.
pub(super) type Broadcast =
    unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Comm, StreamHandle) -> Code;
/// Where, count, type, peer.
pub(super) type Message =
    unsafe extern "C" fn(u64, usize, c_int, c_int, Comm, StreamHandle) -> Code;

/// `CUresult`.
pub(super) type DriverCode = c_int;
pub(super) const DRIVER_SUCCESS: DriverCode = 0;
pub(super) const NOT_READY: DriverCode = 600;
/// `CU_MEMORYTYPE_UNIFIED`: the driver sees from an address what it belongs to.
const MEMORY_UNIFIED: c_uint = 4;

/// `CUDA_MEMCPY2D`, version 2.
#[repr(C)]
#[derive(Default)]
pub(super) struct Copy2D {
    from_x: usize,
    from_y: usize,
    from_type: c_uint,
    from_host: usize,
    from: u64,
    from_array: usize,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_type: c_uint,
    to_host: usize,
    to: u64,
    to_array: usize,
    to_pitch: usize,
    width: usize,
    height: usize,
}

impl Copy2D {
    /// Rows of `width` bytes that lie close together, to places that are `stride` apart.
    pub fn spread(from: u64, to: u64, rows: usize, width: usize, stride: usize) -> Copy2D {
        Copy2D {
            from_type: MEMORY_UNIFIED,
            from,
            from_pitch: width,
            to_type: MEMORY_UNIFIED,
            to,
            to_pitch: stride,
            width,
            height: rows,
            ..Copy2D::default()
        }
    }
}

const _: () = assert!(size_of::<Copy2D>() == 128);

pub(super) type Init = unsafe extern "C" fn(c_uint) -> DriverCode;
pub(super) type GetNumber = unsafe extern "C" fn(*mut c_int) -> DriverCode;
pub(super) type GetDevice = unsafe extern "C" fn(*mut c_int, c_int) -> DriverCode;
pub(super) type GetDeviceName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> DriverCode;
pub(super) type GetDriverError = unsafe extern "C" fn(DriverCode, *mut *const c_char) -> DriverCode;
/// `cuStreamQuery` and `cuEventQuery`.
pub(super) type Query = unsafe extern "C" fn(*mut c_void) -> DriverCode;
pub(super) type CopyAsync = unsafe extern "C" fn(*const Copy2D, StreamHandle) -> DriverCode;
