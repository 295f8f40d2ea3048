//! As much of libfabric's interface as is used, as its headers of API 1.17 lay it out (`fabric.h`,
//! `fi_domain.h`, `fi_endpoint.h`, `fi_eq.h`, `fi_cm.h`, `fi_rma.h`). Later libraries of API 1 only
//! add at the end. Structures that the library allocates are declared up to the last field in use.

use std::ffi::{c_char, c_int, c_void};
use std::mem::offset_of;

/// The API that is asked for.
pub(crate) const VERSION: u32 = 1 << 16 | 17;

pub(crate) const MSG: u64 = 1 << 1;
pub(crate) const RMA: u64 = 1 << 2;
pub(crate) const REMOTE_WRITE: u64 = 1 << 13;
pub(crate) const REMOTE_CQ_DATA: u64 = 1 << 17;
/// To bind a completion queue with: `FI_TRANSMIT | FI_RECV`.
pub(crate) const BOTH_WAYS: u64 = 1 << 11 | 1 << 10;
/// `FI_WRITE`: what memory is registered for that writes come from.
pub(crate) const WRITE: u64 = 1 << 9;
/// The node that `fi_getinfo` is given is the own one.
pub(crate) const SOURCE: u64 = 1 << 57;
/// Mode: each operation brings memory for the provider.
pub(crate) const CONTEXT: u64 = 1 << 59;
pub(crate) const CONTEXT2: u64 = 1 << 52;

pub(crate) const EP_RDM: c_int = 3;
pub(crate) const THREAD_DOMAIN: c_int = 3;
pub(crate) const AV_TABLE: c_int = 2;
pub(crate) const CQ_FORMAT_DATA: c_int = 3;
pub(crate) const WAIT_NONE: c_int = 0;
pub(crate) const MR_LOCAL: c_int = 1 << 2;
pub(crate) const MR_VIRT_ADDR: c_int = 1 << 4;
pub(crate) const MR_ALLOCATED: c_int = 1 << 5;
pub(crate) const MR_PROV_KEY: c_int = 1 << 6;
/// `fi_control`'s command that starts an endpoint.
pub(crate) const ENABLE: c_int = 6;

pub(crate) const EAGAIN: isize = 11;
/// There is an error to be read from the queue.
pub(crate) const EAVAIL: isize = 259;

/// What every object begins with.
#[repr(C)]
pub(crate) struct Fid {
    class: usize,
    context: *mut c_void,
    pub(crate) ops: *const Ops,
}

#[repr(C)]
pub(crate) struct Ops {
    size: usize,
    pub(crate) close: unsafe extern "C" fn(*mut Fid) -> c_int,
    pub(crate) bind: unsafe extern "C" fn(*mut Fid, *mut Fid, u64) -> c_int,
    pub(crate) control: unsafe extern "C" fn(*mut Fid, c_int, *mut c_void) -> c_int,
}

#[repr(C)]
pub(crate) struct Info {
    pub(crate) next: *mut Info,
    pub(crate) caps: u64,
    pub(crate) mode: u64,
    addr_format: u32,
    src_addrlen: usize,
    dest_addrlen: usize,
    src_addr: *mut c_void,
    dest_addr: *mut c_void,
    handle: *mut Fid,
    pub(crate) tx_attr: *mut TxAttr,
    rx_attr: *mut c_void,
    pub(crate) ep_attr: *mut EpAttr,
    pub(crate) domain_attr: *mut DomainAttr,
    pub(crate) fabric_attr: *mut FabricAttr,
}

#[repr(C)]
pub(crate) struct TxAttr {
    caps: u64,
    mode: u64,
    op_flags: u64,
    msg_order: u64,
    comp_order: u64,
    inject_size: usize,
    size: usize,
    pub(crate) iov_limit: usize,
}

#[repr(C)]
pub(crate) struct EpAttr {
    pub(crate) kind: c_int,
    protocol: u32,
    protocol_version: u32,
    pub(crate) max_msg_size: usize,
}

#[repr(C)]
pub(crate) struct DomainAttr {
    domain: *mut Domain,
    name: *mut c_char,
    pub(crate) threading: c_int,
    control_progress: c_int,
    data_progress: c_int,
    resource_mgmt: c_int,
    av_type: c_int,
    pub(crate) mr_mode: c_int,
    pub(crate) mr_key_size: usize,
    pub(crate) cq_data_size: usize,
}

#[repr(C)]
pub(crate) struct FabricAttr {
    fabric: *mut Fabric,
    name: *mut c_char,
    /// Freed by the library, with `free`.
    pub(crate) prov_name: *mut c_char,
}

#[repr(C)]
pub(crate) struct Fabric {
    fid: Fid,
    pub(crate) ops: *const FabricOps,
}

#[repr(C)]
pub(crate) struct FabricOps {
    size: usize,
    pub(crate) domain:
        unsafe extern "C" fn(*mut Fabric, *mut Info, *mut *mut Domain, *mut c_void) -> c_int,
}

#[repr(C)]
pub(crate) struct Domain {
    pub(crate) fid: Fid,
    pub(crate) ops: *const DomainOps,
    pub(crate) mr: *const MrOps,
}

#[repr(C)]
pub(crate) struct DomainOps {
    size: usize,
    pub(crate) av_open:
        unsafe extern "C" fn(*mut Domain, *mut AvAttr, *mut *mut Av, *mut c_void) -> c_int,
    pub(crate) cq_open:
        unsafe extern "C" fn(*mut Domain, *mut CqAttr, *mut *mut Cq, *mut c_void) -> c_int,
    pub(crate) endpoint:
        unsafe extern "C" fn(*mut Domain, *mut Info, *mut *mut Ep, *mut c_void) -> c_int,
}

#[repr(C)]
pub(crate) struct MrOps {
    size: usize,
    /// Domain, memory, its length, access, offset, the key that is asked for, flags.
    pub(crate) reg: unsafe extern "C" fn(
        *mut Fid,
        *const c_void,
        usize,
        u64,
        u64,
        u64,
        u64,
        *mut *mut Mr,
        *mut c_void,
    ) -> c_int,
}

#[repr(C)]
pub(crate) struct Mr {
    fid: Fid,
    pub(crate) desc: *mut c_void,
    pub(crate) key: u64,
}

#[repr(C)]
#[derive(Default)]
pub(crate) struct AvAttr {
    pub(crate) kind: c_int,
    pub(crate) rx_ctx_bits: c_int,
    pub(crate) count: usize,
    pub(crate) ep_per_node: usize,
    pub(crate) name: usize,
    pub(crate) map_addr: usize,
    pub(crate) flags: u64,
}

#[repr(C)]
pub(crate) struct Av {
    pub(crate) fid: Fid,
    pub(crate) ops: *const AvOps,
}

#[repr(C)]
pub(crate) struct AvOps {
    size: usize,
    pub(crate) insert:
        unsafe extern "C" fn(*mut Av, *const c_void, usize, *mut u64, u64, *mut c_void) -> c_int,
}

#[repr(C)]
#[derive(Default)]
pub(crate) struct CqAttr {
    pub(crate) size: usize,
    pub(crate) flags: u64,
    pub(crate) format: c_int,
    pub(crate) wait_obj: c_int,
    pub(crate) signaling_vector: c_int,
    pub(crate) wait_cond: c_int,
    pub(crate) wait_set: usize,
}

#[repr(C)]
pub(crate) struct Cq {
    pub(crate) fid: Fid,
    pub(crate) ops: *const CqOps,
}

#[repr(C)]
pub(crate) struct CqOps {
    size: usize,
    pub(crate) read: unsafe extern "C" fn(*mut Cq, *mut c_void, usize) -> isize,
    readfrom: usize,
    pub(crate) readerr: unsafe extern "C" fn(*mut Cq, *mut CqErrEntry, u64) -> isize,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct CqDataEntry {
    pub(crate) context: *mut c_void,
    pub(crate) flags: u64,
    len: usize,
    buf: *mut c_void,
    pub(crate) data: u64,
}

impl Default for CqDataEntry {
    fn default() -> CqDataEntry {
        let none = std::ptr::null_mut();
        CqDataEntry { context: none, flags: 0, len: 0, buf: none, data: 0 }
    }
}

/// With room for what later libraries add.
#[repr(C)]
pub(crate) struct CqErrEntry {
    pub(crate) context: *mut c_void,
    flags: u64,
    len: usize,
    buf: *mut c_void,
    data: u64,
    tag: u64,
    olen: usize,
    pub(crate) err: c_int,
    prov_errno: c_int,
    err_data: *mut c_void,
    err_data_size: usize,
    more: [usize; 4],
}

impl Default for CqErrEntry {
    fn default() -> CqErrEntry {
        // SAFETY: numbers and pointers, for which all zeros is a value.
        unsafe { std::mem::zeroed() }
    }
}

#[repr(C)]
pub(crate) struct Ep {
    pub(crate) fid: Fid,
    ops: *const c_void,
    pub(crate) cm: *const CmOps,
    msg: *const c_void,
    pub(crate) rma: *const RmaOps,
}

#[repr(C)]
pub(crate) struct CmOps {
    size: usize,
    setname: usize,
    pub(crate) getname: unsafe extern "C" fn(*mut Fid, *mut c_void, *mut usize) -> c_int,
}

#[repr(C)]
pub(crate) struct RmaOps {
    size: usize,
    others: [usize; 5],
    pub(crate) writemsg: unsafe extern "C" fn(*mut Ep, *const MsgRma, u64) -> isize,
}

#[repr(C)]
pub(crate) struct RmaIov {
    pub(crate) addr: u64,
    pub(crate) len: usize,
    pub(crate) key: u64,
}

#[repr(C)]
pub(crate) struct MsgRma {
    pub(crate) iov: *const libc::iovec,
    pub(crate) desc: *mut *mut c_void,
    pub(crate) iov_count: usize,
    pub(crate) addr: u64,
    pub(crate) rma_iov: *const RmaIov,
    pub(crate) rma_iov_count: usize,
    pub(crate) context: *mut c_void,
    pub(crate) data: u64,
}

pub(crate) type GetInfo = unsafe extern "C" fn(
    u32,
    *const c_char,
    *const c_char,
    u64,
    *const Info,
    *mut *mut Info,
) -> c_int;
pub(crate) type FreeInfo = unsafe extern "C" fn(*mut Info);
pub(crate) type DupInfo = unsafe extern "C" fn(*const Info) -> *mut Info;
pub(crate) type OpenFabric =
    unsafe extern "C" fn(*mut FabricAttr, *mut *mut Fabric, *mut c_void) -> c_int;
pub(crate) type StrError = unsafe extern "C" fn(c_int) -> *const c_char;
pub(crate) type Version = unsafe extern "C" fn() -> u32;

// As `offsetof` says of the headers, on the 64-bit machines that there are.
const _: () = {
    assert!(offset_of!(Info, tx_attr) == 72 && offset_of!(Info, fabric_attr) == 104);
    assert!(offset_of!(TxAttr, iov_limit) == 56);
    assert!(offset_of!(EpAttr, max_msg_size) == 16);
    assert!(offset_of!(DomainAttr, mr_mode) == 36 && offset_of!(DomainAttr, cq_data_size) == 48);
    assert!(offset_of!(FabricAttr, prov_name) == 16);
    assert!(offset_of!(Domain, mr) == 32 && offset_of!(DomainOps, endpoint) == 24);
    assert!(offset_of!(Ep, cm) == 32 && offset_of!(Ep, rma) == 48);
    assert!(offset_of!(CmOps, getname) == 16);
    assert!(offset_of!(RmaOps, writemsg) == 48);
    assert!(offset_of!(CqOps, readerr) == 24 && size_of::<CqDataEntry>() == 40);
    assert!(offset_of!(CqErrEntry, err) == 56 && size_of::<CqErrEntry>() >= 80);
    assert!(offset_of!(Mr, desc) == 24 && offset_of!(Mr, key) == 32);
    assert!(size_of::<AvAttr>() == 48 && size_of::<CqAttr>() == 40);
    assert!(size_of::<MsgRma>() == 64 && offset_of!(MsgRma, data) == 56);
    assert!(size_of::<RmaIov>() == 24 && size_of::<Fid>() == 24);
};
