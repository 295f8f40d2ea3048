//! libfabric, found at run time: nothing is linked, and no header is needed to build.

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::{NonNull, null, null_mut};

use super::OfiError;
use super::ffi::{
    DupInfo, Fabric, FabricAttr, Fid, FreeInfo, GetInfo, Info, OpenFabric, StrError, VERSION,
    Version,
};

/// The name under which every version of API 1 is installed.
const NAME: &CStr = c"libfabric.so.1";

/// The library's few functions that are symbols; the others stand in its objects.
#[derive(Clone, Copy)]
pub(crate) struct Library {
    /// Its API: major above 16 bits of minor.
    pub(crate) version: u32,
    getinfo: GetInfo,
    freeinfo: FreeInfo,
    dupinfo: DupInfo,
    fabric: OpenFabric,
    strerror: StrError,
}

impl Library {
    /// Opens it. It is never closed, for it has threads and exit handlers of its own; opening it
    /// again costs nothing.
    pub(crate) fn open() -> Result<Library, OfiError> {
        // SAFETY: the name is a C string; the library's initialisers do not depend on ours.
        let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        let Some(handle) = NonNull::new(handle) else {
            let why = "libfabric.so.1 is not installed (Debian: apt-get install libfabric1)";
            return Err(OfiError::Absent(why.to_owned()));
        };
        let symbol = |name: &CStr| {
            // SAFETY: the handle is open, the name is a C string.
            let symbol = unsafe { libc::dlsym(handle.as_ptr(), name.as_ptr()) };
            let missing = || OfiError::Absent(format!("libfabric.so.1 has no {name:?}"));
            NonNull::new(symbol).ok_or_else(missing)
        };
        // SAFETY: these symbols are functions of these types in every version of API 1, as the
        // headers declare them.
        unsafe {
            use std::mem::transmute as function;
            let version: Version = function(symbol(c"fi_version")?.as_ptr());
            let version = version();
            if version < VERSION || version >> 16 != VERSION >> 16 {
                let (major, minor) = (version >> 16, version & 0xffff);
                let why = format!("libfabric has API {major}.{minor}, 1.17 is the least");
                return Err(OfiError::Absent(why));
            }
            Ok(Library {
                version,
                getinfo: function::<*mut c_void, GetInfo>(symbol(c"fi_getinfo")?.as_ptr()),
                freeinfo: function::<*mut c_void, FreeInfo>(symbol(c"fi_freeinfo")?.as_ptr()),
                dupinfo: function::<*mut c_void, DupInfo>(symbol(c"fi_dupinfo")?.as_ptr()),
                fabric: function::<*mut c_void, OpenFabric>(symbol(c"fi_fabric")?.as_ptr()),
                strerror: function::<*mut c_void, StrError>(symbol(c"fi_strerror")?.as_ptr()),
            })
        }
    }

    /// An empty description, to be filled as a wish.
    pub(crate) fn wish(&self) -> Result<OwnedInfo, OfiError> {
        // SAFETY: nothing is what makes an empty one.
        let info = NonNull::new(unsafe { (self.dupinfo)(null()) });
        let info = info.ok_or_else(|| self.failed("fi_dupinfo", -libc::ENOMEM as isize))?;
        Ok(OwnedInfo { info, library: *self })
    }

    /// The first that the library has for a wish, on the interface of `source` if one is given.
    pub(crate) fn find(
        &self,
        source: Option<&CStr>,
        flags: u64,
        wish: &OwnedInfo,
    ) -> Result<OwnedInfo, OfiError> {
        let (node, flags) = source.map_or((null(), 0), |source| (source.as_ptr(), flags));
        let mut found = null_mut();
        // SAFETY: the wish is whole, the node is a C string, the result is written once.
        let code =
            unsafe { (self.getinfo)(VERSION, node, null(), flags, wish.info.as_ptr(), &mut found) };
        self.check("fi_getinfo", code)?;
        let info = NonNull::new(found).ok_or_else(|| self.failed("fi_getinfo", 0))?;
        Ok(OwnedInfo { info, library: *self })
    }

    pub(crate) fn fabric(&self, info: &OwnedInfo) -> Result<Owned<Fabric>, OfiError> {
        let mut fabric = null_mut();
        // SAFETY: the attributes belong to a description that the library has made.
        let code = unsafe {
            let attributes: *mut FabricAttr = (*info.info.as_ptr()).fabric_attr;
            (self.fabric)(attributes, &mut fabric, null_mut())
        };
        self.own("fi_fabric", code, fabric)
    }

    /// What a call came to that makes an object.
    pub(crate) fn own<T>(
        &self,
        what: &'static str,
        code: c_int,
        object: *mut T,
    ) -> Result<Owned<T>, OfiError> {
        self.check(what, code)?;
        NonNull::new(object).map(Owned).ok_or_else(|| self.failed(what, 0))
    }

    pub(crate) fn check(&self, what: &'static str, code: c_int) -> Result<(), OfiError> {
        if code == 0 { Ok(()) } else { Err(self.failed(what, code as isize)) }
    }

    pub(crate) fn failed(&self, what: &'static str, code: isize) -> OfiError {
        // SAFETY: the function takes any number, and returns a string that lives for ever.
        let text = unsafe { CStr::from_ptr((self.strerror)((-code) as c_int)) };
        OfiError::Call { what, text: text.to_string_lossy().into_owned() }
    }
}

/// A description that the library has made.
pub(crate) struct OwnedInfo {
    info: NonNull<Info>,
    library: Library,
}

impl OwnedInfo {
    pub(crate) fn as_ptr(&self) -> *mut Info {
        self.info.as_ptr()
    }

    /// Wishes for a provider. The library frees the name.
    pub(crate) fn name(&mut self, provider: &str) -> Result<(), OfiError> {
        let name = CString::new(provider).ok();
        // SAFETY: `strdup` copies a C string; the description has fabric attributes, as every one
        // that `fi_dupinfo` has made.
        let copied = unsafe {
            let copy = name.map_or(null_mut(), |name| libc::strdup(name.as_ptr()));
            (*(*self.as_ptr()).fabric_attr).prov_name = copy;
            !copy.is_null()
        };
        let wrong = || OfiError::Unsuitable(format!("'{provider}' is no provider's name"));
        copied.then_some(()).ok_or_else(wrong)
    }
}

impl Drop for OwnedInfo {
    fn drop(&mut self) {
        // SAFETY: owned, and not used afterwards.
        unsafe { (self.library.freeinfo)(self.info.as_ptr()) }
    }
}

/// An object of the library; every one begins with a [`Fid`]. Closed when dropped, so whoever holds
/// several declares first what depends on others.
pub(crate) struct Owned<T>(NonNull<T>);

// SAFETY: objects may be used from any thread, one at a time, which their holder sees to.
unsafe impl<T> Send for Owned<T> {}

impl<T> Owned<T> {
    pub(crate) fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }

    pub(crate) fn fid(&self) -> *mut Fid {
        self.0.as_ptr().cast()
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: an open object that begins with a `Fid`, and is not used afterwards.
        unsafe { ((*(*self.fid()).ops).close)(self.fid()) };
    }
}
