//! What tests need of a device: a context, a stream, memory, copies. By the driver's functions, so
//! that the same checks run on a GPU and on the stand-in.

use std::cell::Cell;
use std::ffi::{CString, c_int, c_uint, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null_mut;

use pomona_fabric::nccl::{DeviceBytes, Event, Stream, Work};

/// The driver's functions.
#[derive(Clone, Copy)]
pub struct Driver {
    init: unsafe extern "C" fn(c_uint) -> c_int,
    get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int,
    release: unsafe extern "C" fn(c_int) -> c_int,
    set_current: unsafe extern "C" fn(*mut c_void) -> c_int,
    allocate: unsafe extern "C" fn(*mut u64, usize) -> c_int,
    free: unsafe extern "C" fn(u64) -> c_int,
    to_device: unsafe extern "C" fn(u64, *const u8, usize) -> c_int,
    to_host: unsafe extern "C" fn(*mut u8, u64, usize) -> c_int,
    stream_create: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> c_int,
    stream_destroy: unsafe extern "C" fn(*mut c_void) -> c_int,
    event_create: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> c_int,
    event_record: unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int,
    event_destroy: unsafe extern "C" fn(*mut c_void) -> c_int,
}

/// A function of a library, which stays open.
pub fn function<F: Copy>(path: &Path, name: &str) -> F {
    let file = CString::new(path.as_os_str().as_bytes()).unwrap();
    let words = CString::new(name).unwrap();
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    // SAFETY: C strings; the caller knows what type the function has.
    unsafe {
        let library = libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!library.is_null(), "{} does not open", path.display());
        let symbol = libc::dlsym(library, words.as_ptr());
        assert!(!symbol.is_null(), "{} has no {name}", path.display());
        std::mem::transmute_copy(&symbol)
    }
}

impl Driver {
    pub fn open(path: &Path) -> Driver {
        Driver {
            init: function(path, "cuInit"),
            get: function(path, "cuDeviceGet"),
            retain: function(path, "cuDevicePrimaryCtxRetain"),
            release: function(path, "cuDevicePrimaryCtxRelease_v2"),
            set_current: function(path, "cuCtxSetCurrent"),
            allocate: function(path, "cuMemAlloc_v2"),
            free: function(path, "cuMemFree_v2"),
            to_device: function(path, "cuMemcpyHtoD_v2"),
            to_host: function(path, "cuMemcpyDtoH_v2"),
            stream_create: function(path, "cuStreamCreate"),
            stream_destroy: function(path, "cuStreamDestroy_v2"),
            event_create: function(path, "cuEventCreate"),
            event_record: function(path, "cuEventRecord"),
            event_destroy: function(path, "cuEventDestroy_v2"),
        }
    }
}

/// A device whose context is current on the thread that opened it, with a stream.
pub struct Device {
    driver: Driver,
    device: c_int,
    stream: *mut c_void,
    event: Cell<*mut c_void>,
}

impl Device {
    pub fn open(driver: Driver, ordinal: usize) -> Device {
        let (mut device, mut context, mut stream) = (0, null_mut(), null_mut());
        // SAFETY: results are written once, in the order in which one needs the other. The stream
        // is an ordinary one, which waits for copies from the host.
        unsafe {
            assert_eq!((driver.init)(0), 0);
            assert_eq!((driver.get)(&mut device, ordinal as c_int), 0);
            assert_eq!((driver.retain)(&mut context, device), 0);
            assert_eq!((driver.set_current)(context), 0);
            assert_eq!((driver.stream_create)(&mut stream, 0), 0);
        }
        Device { driver, device, stream, event: Cell::new(null_mut()) }
    }

    pub fn stream(&self) -> Stream {
        // SAFETY: it lives as long as the device, behind the communicator.
        unsafe { Stream::new(self.stream) }
    }

    pub fn work(&self) -> Work {
        Work::Stream(self.stream())
    }

    /// What was given to the stream so far, whatever comes behind it.
    pub fn work_so_far(&self) -> Work {
        // SAFETY: made once, recorded again and again, destroyed with the device.
        unsafe {
            if self.event.get().is_null() {
                let mut event = null_mut();
                assert_eq!((self.driver.event_create)(&mut event, 2), 0);
                self.event.set(event);
            }
            assert_eq!((self.driver.event_record)(self.event.get(), self.stream), 0);
            Work::Event(Event::new(self.event.get()))
        }
    }

    /// Memory with these bytes.
    pub fn put(&self, bytes: &[u8]) -> Memory {
        let mut address = 0;
        // SAFETY: as many bytes as there are, or one.
        unsafe {
            assert_eq!((self.driver.allocate)(&mut address, bytes.len().max(1)), 0);
            if !bytes.is_empty() {
                assert_eq!((self.driver.to_device)(address, bytes.as_ptr(), bytes.len()), 0);
            }
        }
        Memory { driver: self.driver, address, length: bytes.len() }
    }

    /// Memory that holds nothing of meaning.
    pub fn room(&self, bytes: usize) -> Memory {
        self.put(&vec![0xee; bytes])
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: made in `open`; nothing is on the stream any more.
        unsafe {
            if !self.event.get().is_null() {
                (self.driver.event_destroy)(self.event.get());
            }
            (self.driver.stream_destroy)(self.stream);
            (self.driver.release)(self.device);
        }
    }
}

/// Memory of a device.
pub struct Memory {
    driver: Driver,
    address: u64,
    length: usize,
}

impl Memory {
    pub fn bytes(&self) -> DeviceBytes {
        // SAFETY: freed when it is dropped, which tests do behind their waits, or their failures.
        unsafe { DeviceBytes::new(self.address, self.length) }
    }

    pub fn get(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        if self.length > 0 {
            // SAFETY: as long as it was made.
            let code =
                unsafe { (self.driver.to_host)(bytes.as_mut_ptr(), self.address, self.length) };
            assert_eq!(code, 0);
        }
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `put`.
        unsafe { (self.driver.free)(self.address) };
    }
}
