//! One endpoint and what belongs to it: it writes into the arenas of others with a number that
//! tells them, and hears such numbers from them. Used by one thread at a time.

use std::cell::UnsafeCell;
use std::ffi::{CString, c_int, c_void};
use std::net::IpAddr;
use std::ptr::null_mut;

use super::OfiError;
use super::ffi::{
    self, Av, AvAttr, Cq, CqAttr, CqDataEntry, CqErrEntry, Domain, Ep, Fabric, Mr, MsgRma, RmaIov,
};
use super::library::{Library, Owned, OwnedInfo};
use crate::link::memory::Memory;

/// Parts of a write without a copy before it.
const PIECES_MAX: usize = 4;
/// Bytes up to which a write is copied into a slot of its own, so that nobody waits for it. The
/// library's own injection is not used: it crashes when the peer of an injected write is gone
/// (`ofi_rxm` of 1.17 handles the cancelled write as if it had a context).
const SMALL_BYTES: usize = 4096;
/// Such writes that may be under way.
const SLOTS: usize = 64;
/// The operation of a large write, of which there is one at a time: behind those of the slots.
const LARGE: usize = SLOTS;
/// Completions that may wait to be read.
const COMPLETIONS: usize = 4096;
/// Completions read at once.
const READ: usize = 16;
/// The longest address of an endpoint.
pub(crate) const NAME_BYTES_MAX: usize = 512;

/// Where an arena is, for those who write into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) key: u64,
}

/// Memory that a write lends to the provider until it is complete.
#[repr(C)]
struct Operation {
    /// `fi_context2`.
    scratch: [usize; 8],
    state: State,
    /// Whom it writes to.
    rank: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Complete,
    Failed(c_int),
}

impl Operation {
    fn new() -> Operation {
        Operation { scratch: [0; 8], state: State::Complete, rank: 0 }
    }
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// All of it; the parts may be reused.
    Done,
    /// The parts are in use until [`is_complete`](Endpoint::is_complete), or until the endpoint is
    /// dropped.
    Pending,
    /// There was no room: again, after a look at what has come.
    Again,
}

/// Something under way has failed.
pub(crate) struct Failure {
    /// To whom, when that is known.
    pub(crate) rank: Option<usize>,
    pub(crate) error: OfiError,
}

/// In the order in which they are closed.
pub(crate) struct Endpoint {
    ep: Owned<Ep>,
    registered: Option<Registered>,
    _region: Owned<Mr>,
    av: Owned<Av>,
    cq: Owned<Cq>,
    _domain: Owned<Domain>,
    _fabric: Owned<Fabric>,
    info: OwnedInfo,
    library: Library,
    /// One for each slot, and one for a large write.
    operations: Box<[UnsafeCell<Operation>]>,
    /// The slot that is looked at first.
    next: usize,
    /// Bytes of the slots.
    slots: Memory,
    /// Parts of a large write that were copied into one piece, without staging.
    gathered: Vec<u8>,
    targets: Vec<u64>,
    own_region: Region,
}

/// What a provider wants that reaches memory only where it was registered: the slots, and a copy of
/// large writes.
struct Registered {
    slots: Owned<Mr>,
    staging: Owned<Mr>,
    copy: Memory,
}

// SAFETY: operations are touched by whoever has the endpoint, one thread at a time.
unsafe impl Send for Endpoint {}

impl Endpoint {
    /// Opens a provider's endpoint whose arena is `memory`, which has to live as long.
    pub(crate) fn open(
        library: Library,
        provider: &str,
        source: IpAddr,
        memory: &Memory,
    ) -> Result<Endpoint, OfiError> {
        let info = describe(&library, provider, source)?;
        let fabric = library.fabric(&info)?;
        let domain = open_domain(&library, &fabric, &info)?;
        let av = open_av(&library, &domain)?;
        let cq = open_cq(&library, &domain)?;
        // SAFETY: attributes of a description that the library has made.
        let mr_mode = unsafe { (*(*info.as_ptr()).domain_attr).mr_mode };
        let region = register(&library, &domain, memory, ffi::REMOTE_WRITE, 1)?;
        // SAFETY: the region was just made.
        let key = unsafe { (*region.as_ptr()).key };
        let by_address = mr_mode & ffi::MR_VIRT_ADDR != 0;
        let start = if by_address { memory.start() as u64 } else { 0 };
        let slots = Memory::new(SLOTS * SMALL_BYTES);
        let registered = if mr_mode & ffi::MR_LOCAL != 0 {
            let copy = Memory::new(memory.len());
            let slots = register(&library, &domain, &slots, ffi::WRITE, 2)?;
            Some(Registered {
                slots,
                staging: register(&library, &domain, &copy, ffi::WRITE, 3)?,
                copy,
            })
        } else {
            None
        };
        let ep = open_ep(&library, &domain, &info)?;
        // SAFETY: all objects are open, and the endpoint is not enabled yet.
        unsafe {
            let ops = (*ep.fid()).ops;
            library.check("fi_ep_bind", ((*ops).bind)(ep.fid(), av.fid(), 0))?;
            library.check("fi_ep_bind", ((*ops).bind)(ep.fid(), cq.fid(), ffi::BOTH_WAYS))?;
            library.check("fi_enable", ((*ops).control)(ep.fid(), ffi::ENABLE, null_mut()))?;
        }
        Ok(Endpoint {
            ep,
            registered,
            _region: region,
            av,
            cq,
            _domain: domain,
            _fabric: fabric,
            info,
            library,
            operations: (0..=LARGE).map(|_| UnsafeCell::new(Operation::new())).collect(),
            next: 0,
            slots,
            gathered: Vec::new(),
            targets: Vec::new(),
            own_region: Region { start, key },
        })
    }

    /// Where the own arena is.
    pub(crate) fn region(&self) -> Region {
        self.own_region
    }

    /// Under which name others reach it.
    pub(crate) fn name(&self) -> Result<Vec<u8>, OfiError> {
        let mut name = vec![0; NAME_BYTES_MAX];
        let mut bytes = name.len();
        // SAFETY: the endpoint is enabled; the name is written into as many bytes as there are.
        let code = unsafe {
            let getname = (*(*self.ep.as_ptr()).cm).getname;
            getname(self.ep.fid(), name.as_mut_ptr().cast(), &mut bytes)
        };
        self.library.check("fi_getname", code)?;
        name.truncate(bytes);
        Ok(name)
    }

    /// Takes the names of all ranks in their order, those that are none as their own.
    pub(crate) fn insert(&mut self, names: &[Vec<u8>]) -> Result<(), OfiError> {
        for name in names {
            let mut target = u64::MAX;
            // SAFETY: the name is one that an endpoint of the same provider has told; a padded copy
            // stands for providers that read a fixed length.
            let inserted = unsafe {
                let mut padded = [0u8; NAME_BYTES_MAX];
                padded[..name.len()].copy_from_slice(name);
                let insert = (*(*self.av.as_ptr()).ops).insert;
                insert(self.av.as_ptr(), padded.as_ptr().cast(), 1, &mut target, 0, null_mut())
            };
            if inserted != 1 {
                return Err(self.library.failed("fi_av_insert", inserted.min(0) as isize));
            }
            self.targets.push(target);
        }
        Ok(())
    }

    /// Writes the parts to `offset` of a rank's arena, and tells it `data` when they are there.
    pub(crate) fn write(
        &mut self,
        rank: usize,
        region: Region,
        offset: usize,
        parts: &[&[u8]],
        data: u64,
    ) -> Result<Written, OfiError> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let mut pieces = [libc::iovec { iov_base: null_mut(), iov_len: 0 }; PIECES_MAX];
        let mut descs = [null_mut(); PIECES_MAX];
        let (operation, count) = if bytes <= SMALL_BYTES {
            let Some(slot) = self.free_slot() else { return Ok(Written::Again) };
            self.fill(slot, parts, bytes, &mut pieces[0], &mut descs[0]);
            (slot, 1)
        } else {
            (LARGE, self.pieces(parts, bytes, &mut pieces, &mut descs))
        };
        let remote = RmaIov { addr: region.start + offset as u64, len: bytes, key: region.key };
        let message = MsgRma {
            iov: pieces.as_ptr(),
            desc: descs.as_mut_ptr(),
            iov_count: count,
            addr: self.targets[rank],
            rma_iov: &remote,
            rma_iov_count: 1,
            context: self.operations[operation].get().cast(),
            data,
        };
        // SAFETY: the provider does not have the operation, for its last write is complete. The
        // lists live through the call; parts, slot and operation until the write is complete, or
        // the endpoint is closed.
        let code = unsafe {
            let write = (*(*self.ep.as_ptr()).rma).writemsg;
            write(self.ep.as_ptr(), &message, ffi::REMOTE_CQ_DATA)
        };
        match code {
            0 => {}
            _ if code == -ffi::EAGAIN => return Ok(Written::Again),
            _ => return Err(self.library.failed("fi_writemsg", code)),
        }
        // SAFETY: completions are read by whoever has the endpoint: not before this returns.
        unsafe {
            let operation = self.operations[operation].get();
            (*operation).state = State::Pending;
            (*operation).rank = rank;
        }
        Ok(if operation == LARGE { Written::Pending } else { Written::Done })
    }

    /// A slot whose last write is complete.
    fn free_slot(&mut self) -> Option<usize> {
        let order = (0..SLOTS).map(|ahead| (self.next + ahead) % SLOTS);
        // SAFETY: states are written by whoever has the endpoint.
        let is_free =
            |slot: &usize| unsafe { (*self.operations[*slot].get()).state != State::Pending };
        let slot = order.into_iter().find(is_free)?;
        self.next = (slot + 1) % SLOTS;
        Some(slot)
    }

    /// Copies the parts of a small write into a slot.
    fn fill(
        &self,
        slot: usize,
        parts: &[&[u8]],
        bytes: usize,
        piece: &mut libc::iovec,
        desc: &mut *mut c_void,
    ) {
        let mut at = slot * SMALL_BYTES;
        piece.iov_base = self.slots.at(at, bytes).cast();
        piece.iov_len = bytes;
        for part in parts {
            self.slots.write(at, part);
            at += part.len();
        }
        if let Some(registered) = &self.registered {
            // SAFETY: the region is open.
            *desc = unsafe { (*registered.slots.as_ptr()).desc };
        }
    }

    /// The parts of a large write as the library wants them: as they are, or copied into one. How
    /// many there are.
    fn pieces(
        &mut self,
        parts: &[&[u8]],
        bytes: usize,
        pieces: &mut [libc::iovec; PIECES_MAX],
        descs: &mut [*mut c_void; PIECES_MAX],
    ) -> usize {
        // SAFETY: attributes of a description that the library has made.
        let limit = unsafe { (*(*self.info.as_ptr()).tx_attr).iov_limit }.min(PIECES_MAX);
        let filled = || parts.iter().filter(|part| !part.is_empty());
        if self.registered.is_none() && filled().count() <= limit {
            for (piece, part) in pieces.iter_mut().zip(filled()) {
                piece.iov_base = part.as_ptr().cast_mut().cast();
                piece.iov_len = part.len();
            }
            return filled().count();
        }
        pieces[0].iov_len = bytes;
        if let Some(Registered { staging, copy, .. }) = &self.registered {
            let mut at = 0;
            for part in filled() {
                copy.write(at, part);
                at += part.len();
            }
            pieces[0].iov_base = copy.start().cast();
            // SAFETY: the region is open.
            descs[0] = unsafe { (*staging.as_ptr()).desc };
        } else {
            self.gathered.clear();
            filled().for_each(|part| self.gathered.extend_from_slice(part));
            pieces[0].iov_base = self.gathered.as_mut_ptr().cast();
        }
        1
    }

    /// Moves what is under way, and hands over the numbers that others have told.
    pub(crate) fn progress(&mut self, mut told: impl FnMut(u64)) -> Result<(), Failure> {
        let empty = CqDataEntry::default();
        let mut entries = [empty; READ];
        // SAFETY: the queue is open, and its format is that of the entries.
        let read = unsafe {
            let read = (*(*self.cq.as_ptr()).ops).read;
            read(self.cq.as_ptr(), entries.as_mut_ptr().cast(), READ)
        };
        match read {
            _ if read == -ffi::EAGAIN => return Ok(()),
            _ if read == -ffi::EAVAIL => return self.error(),
            ..0 => {
                let error = self.library.failed("fi_cq_read", read);
                return Err(Failure { rank: None, error });
            }
            _ => {}
        }
        for entry in &entries[..read as usize] {
            if entry.flags & ffi::REMOTE_CQ_DATA != 0 {
                told(entry.data);
            } else if !entry.context.is_null() {
                // SAFETY: the context of an own operation; they live as long as the endpoint.
                unsafe { (*entry.context.cast::<Operation>()).state = State::Complete };
            }
        }
        Ok(())
    }

    fn error(&mut self) -> Result<(), Failure> {
        let mut entry = CqErrEntry::default();
        // SAFETY: the queue is open, the entry is at least as long as the library's.
        let code = unsafe {
            let readerr = (*(*self.cq.as_ptr()).ops).readerr;
            readerr(self.cq.as_ptr(), &mut entry, 0)
        };
        let error = self.library.failed("fi_writemsg", -(entry.err as isize));
        if code != 1 || entry.context.is_null() {
            return Err(Failure { rank: None, error });
        }
        let operation = entry.context.cast::<Operation>();
        // SAFETY: the context of an own operation; they live as long as the endpoint.
        let rank = unsafe {
            (*operation).state = State::Failed(entry.err);
            (*operation).rank
        };
        Err(Failure { rank: Some(rank), error })
    }

    /// Whether the large write is complete.
    pub(crate) fn is_complete(&self) -> Result<bool, OfiError> {
        // SAFETY: written in `write` and `progress` only, by whoever has the endpoint.
        match unsafe { (*self.operations[LARGE].get()).state } {
            State::Pending => Ok(false),
            State::Complete => Ok(true),
            State::Failed(code) => Err(self.library.failed("fi_writemsg", -(code as isize))),
        }
    }
}

/// What the library has of a provider that suits.
fn describe(library: &Library, provider: &str, source: IpAddr) -> Result<OwnedInfo, OfiError> {
    let mut wish = library.wish()?;
    wish.name(provider)?;
    // SAFETY: a description that the library has made has all attributes.
    unsafe {
        let info = &mut *wish.as_ptr();
        info.caps = ffi::MSG | ffi::RMA;
        info.mode = ffi::CONTEXT | ffi::CONTEXT2;
        (*info.ep_attr).kind = ffi::EP_RDM;
        (*info.domain_attr).threading = ffi::THREAD_DOMAIN;
        (*info.domain_attr).mr_mode =
            ffi::MR_LOCAL | ffi::MR_VIRT_ADDR | ffi::MR_ALLOCATED | ffi::MR_PROV_KEY;
    }
    let source = CString::new(source.to_string()).expect("an address has no zero byte");
    // Shared memory has no addresses of machines.
    let source = (provider != "shm").then_some(source.as_c_str());
    let found = library.find(source, ffi::SOURCE, &wish).map_err(|error| {
        OfiError::Unsuitable(format!("provider '{provider}' has no remote writes here: {error}"))
    })?;
    // SAFETY: as above.
    let bytes = unsafe { (*(*found.as_ptr()).domain_attr).cq_data_size };
    if bytes < 4 {
        let why = format!("provider '{provider}' tells {bytes} bytes with a write, 4 are needed");
        return Err(OfiError::Unsuitable(why));
    }
    Ok(found)
}

fn open_domain(
    library: &Library,
    fabric: &Owned<Fabric>,
    info: &OwnedInfo,
) -> Result<Owned<Domain>, OfiError> {
    let mut domain = null_mut();
    // SAFETY: fabric and description belong together.
    let code = unsafe {
        let open = (*(*fabric.as_ptr()).ops).domain;
        open(fabric.as_ptr(), info.as_ptr(), &mut domain, null_mut())
    };
    library.own("fi_domain", code, domain)
}

fn open_av(library: &Library, domain: &Owned<Domain>) -> Result<Owned<Av>, OfiError> {
    let mut attributes = AvAttr { kind: ffi::AV_TABLE, ..AvAttr::default() };
    let mut av = null_mut();
    // SAFETY: the domain is open, the attributes are whole.
    let code = unsafe {
        let open = (*(*domain.as_ptr()).ops).av_open;
        open(domain.as_ptr(), &mut attributes, &mut av, null_mut())
    };
    library.own("fi_av_open", code, av)
}

fn open_cq(library: &Library, domain: &Owned<Domain>) -> Result<Owned<Cq>, OfiError> {
    let mut attributes = CqAttr {
        size: COMPLETIONS,
        format: ffi::CQ_FORMAT_DATA,
        wait_obj: ffi::WAIT_NONE,
        ..CqAttr::default()
    };
    let mut cq = null_mut();
    // SAFETY: the domain is open, the attributes are whole.
    let code = unsafe {
        let open = (*(*domain.as_ptr()).ops).cq_open;
        open(domain.as_ptr(), &mut attributes, &mut cq, null_mut())
    };
    library.own("fi_cq_open", code, cq)
}

fn open_ep(
    library: &Library,
    domain: &Owned<Domain>,
    info: &OwnedInfo,
) -> Result<Owned<Ep>, OfiError> {
    let mut ep = null_mut();
    // SAFETY: domain and description belong together.
    let code = unsafe {
        let open = (*(*domain.as_ptr()).ops).endpoint;
        open(domain.as_ptr(), info.as_ptr(), &mut ep, null_mut())
    };
    library.own("fi_endpoint", code, ep)
}

fn register(
    library: &Library,
    domain: &Owned<Domain>,
    memory: &Memory,
    access: u64,
    key: u64,
) -> Result<Owned<Mr>, OfiError> {
    let mut region = null_mut();
    // SAFETY: the domain is open; the memory outlives the region, which its holder sees to.
    let code = unsafe {
        let reg = (*(*domain.as_ptr()).mr).reg;
        let (from, bytes) = (memory.start().cast(), memory.len());
        reg(domain.fid(), from, bytes, access, 0, key, 0, &mut region, null_mut())
    };
    library.own("fi_mr_reg", code, region)
}
