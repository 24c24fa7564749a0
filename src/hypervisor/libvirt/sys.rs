//! The calls of libvirt that the crate `virt` lacks, or wraps without looking at their result, made safe.
//!
//! Owns all `unsafe` of the hypervisor adapter. Invariants
//! - Every function must run on one thread from the call to [`Error::last_error`]: libvirt keeps the error per thread.
//! - No panic leaves a callback: unwinding through libvirt's C frames would be undefined.
//! - A callback never calls libvirt: it runs on the event loop's thread, which would wait for itself.
//!
//! `virt` 0.5.0 wraps `virDomainGetState` and `virDomainGetBlockInfo` too, but ignores a failure and then reads
//! memory nobody has written; its `job_stats` frees libvirt's memory as if Rust had allocated it. Hence our own.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::raw::{c_char, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

pub type Result<T> = std::result::Result<T, Error>;

/// What `virDomainGetBlockJobInfo` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockJobInfo {
    /// One of `VIR_DOMAIN_BLOCK_JOB_TYPE_*`.
    pub kind: u32,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// State (`VIR_DOMAIN_*`) and the reason for it.
pub fn state(domain: &Domain) -> Result<(u32, i32)> {
    let (mut state, mut reason) = (0, 0);
    // SAFETY: `domain` keeps its pointer alive for the call; both results are valid for writing.
    check(unsafe { sys::virDomainGetState(domain.as_ptr(), &mut state, &mut reason, 0) })?;
    Ok((state as u32, reason))
}

/// CPU time of libvirt's host since it was started, all processors together, by kind (`user`, `kernel` ...), in ns.
pub fn cpu_times_ns(connection: &Connect) -> Result<Vec<(String, u64)>> {
    let all = sys::VIR_NODE_CPU_STATS_ALL_CPUS;
    let mut count: c_int = 0;
    // SAFETY: without an array the call only says how many there are; `connection` outlives it.
    check(unsafe { sys::virNodeGetCPUStats(connection.as_ptr(), all, ptr::null_mut(), &mut count, 0) })?;
    let mut times = Vec::with_capacity(usize::try_from(count).unwrap_or_default());
    // SAFETY: all zero is a value of this struct of numbers and characters.
    times.resize_with(times.capacity(), || unsafe { std::mem::zeroed::<sys::virNodeCPUStats>() });
    // SAFETY: the array has room for `count` elements, which is also told.
    check(unsafe { sys::virNodeGetCPUStats(connection.as_ptr(), all, times.as_mut_ptr(), &mut count, 0) })?;
    times.truncate(usize::try_from(count).unwrap_or_default());
    let name = |field: &[c_char]| field.iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect();
    Ok(times.iter().map(|t| (name(&t.field), t.value)).collect())
}

/// The unit in which the kernel counts CPU time.
pub fn ticks_per_second() -> u64 {
    // SAFETY: it takes a number and gives one.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).ok().filter(|ticks| *ticks > 0).unwrap_or(100)
}

/// Bytes of the disk as the guest sees it. Works for a domain that is off as well.
pub fn capacity_bytes(domain: &Domain, disk: &str) -> Result<u64> {
    let disk = CString::new(disk)?;
    let mut info = MaybeUninit::<sys::virDomainBlockInfo>::uninit();
    // SAFETY: `domain` and `disk` outlive the call; `info` is valid for writing and read only after success.
    unsafe {
        check(sys::virDomainGetBlockInfo(domain.as_ptr(), disk.as_ptr(), info.as_mut_ptr(), 0))?;
        Ok(info.assume_init().capacity)
    }
}

/// Starts a commit of `top` into `base`, both absolute paths, without a bandwidth limit.
pub fn block_commit(domain: &Domain, disk: &str, base: &str, top: &str, flags: u32) -> Result<()> {
    let (disk, base, top) = (CString::new(disk)?, CString::new(base)?, CString::new(top)?);
    // SAFETY: `domain` and the three strings outlive the call; libvirt copies what it keeps.
    check(unsafe {
        sys::virDomainBlockCommit(domain.as_ptr(), disk.as_ptr(), base.as_ptr(), top.as_ptr(), 0, flags as c_uint)
    })
    .map(drop)
}

/// Starts to copy what is below the disk's uppermost image into it; `rate_bytes` in a second, 0: as fast as it goes.
pub fn block_pull(domain: &Domain, disk: &str, rate_bytes: u64) -> Result<()> {
    let disk = CString::new(disk)?;
    // SAFETY: `domain` and `disk` outlive the call.
    check(unsafe {
        let flags = sys::VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES;
        sys::virDomainBlockPull(domain.as_ptr(), disk.as_ptr(), rate_bytes, flags as c_uint)
    })
    .map(drop)
}

/// Starts to copy the whole disk to what `xml` describes, which is there; from now on the guest writes to both.
/// `rate_bytes` in a second, 0: as fast as it goes.
pub fn block_copy(domain: &Domain, disk: &str, xml: &str, rate_bytes: u64) -> Result<()> {
    let (disk, xml) = (CString::new(disk)?, CString::new(xml)?);
    let flags = sys::VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
        | sys::VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        | sys::VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES;
    let mut params: sys::virTypedParameterPtr = ptr::null_mut();
    let (mut count, mut room): (c_int, c_int) = (0, 0);
    // SAFETY: `domain` and the strings outlive the calls. `params` is null or holds `count` parameters that libvirt
    // allocated, and that only `virTypedParamsFree` may free, null and 0 included.
    unsafe {
        let field = sys::VIR_DOMAIN_BLOCK_COPY_BANDWIDTH.as_ptr();
        let done =
            check(sys::virTypedParamsAddULLong(&mut params, &mut count, &mut room, field, rate_bytes)).and_then(|_| {
                let (disk, xml) = (disk.as_ptr(), xml.as_ptr());
                check(sys::virDomainBlockCopy(domain.as_ptr(), disk, xml, params, count, flags as c_uint))
            });
        sys::virTypedParamsFree(params, count);
        done.map(drop)
    }
}

/// Ends the disk's block job; with `VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT` in favour of its target. Returns when it has
/// ended.
pub fn block_job_abort(domain: &Domain, disk: &str, flags: u32) -> Result<()> {
    let disk = CString::new(disk)?;
    // SAFETY: `domain` and `disk` outlive the call.
    check(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags as c_uint) }).map(drop)
}

/// The disk's block job, if it has one. A finished commit may be gone before anybody asked.
pub fn block_job_info(domain: &Domain, disk: &str) -> Result<Option<BlockJobInfo>> {
    let disk = CString::new(disk)?;
    let mut info = MaybeUninit::<sys::virDomainBlockJobInfo>::zeroed();
    // SAFETY: `domain` and `disk` outlive the call; `info` is valid for writing, and all-zero is a value of it.
    let (found, info) = unsafe {
        let found = check(sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), info.as_mut_ptr(), 0))?;
        (found, info.assume_init())
    };
    Ok((found > 0).then_some(BlockJobInfo { kind: info.type_ as u32, done_bytes: info.cur, total_bytes: info.end }))
}

/// Begins a backup job, without a checkpoint.
pub fn backup_begin(domain: &Domain, xml: &str) -> Result<()> {
    let xml = CString::new(xml)?;
    // SAFETY: `domain` and `xml` outlive the call; a checkpoint may be null.
    check(unsafe { sys::virDomainBackupBegin(domain.as_ptr(), xml.as_ptr(), ptr::null(), 0) }).map(drop)
}

/// The description of the backup that runs; an error of `NoDomainBackup` if none does.
pub fn backup_xml(domain: &Domain) -> Result<String> {
    // SAFETY: `domain` outlives the call. What is returned is a terminated string that is ours to free, once.
    unsafe {
        let text = sys::virDomainBackupGetXMLDesc(domain.as_ptr(), 0);
        if text.is_null() {
            return Err(Error::last_error());
        }
        let xml = CStr::from_ptr(text).to_string_lossy().into_owned();
        libc::free(text.cast());
        Ok(xml)
    }
}

/// Ends the job that runs on the domain as a whole.
pub fn abort_job(domain: &Domain) -> Result<()> {
    // SAFETY: `domain` outlives the call.
    check(unsafe { sys::virDomainAbortJob(domain.as_ptr()) }).map(drop)
}

/// The operation (`VIR_DOMAIN_JOB_OPERATION_*`) of the job that runs on the domain as a whole, if one does.
pub fn domain_job(domain: &Domain) -> Result<Option<u32>> {
    let mut kind: c_int = 0;
    let mut params: sys::virTypedParameterPtr = ptr::null_mut();
    let mut count: c_int = 0;
    let mut operation: c_int = 0;
    // SAFETY: `domain` outlives the call and the results are valid for writing. After success `params` holds `count`
    // parameters that libvirt allocated and that only `virTypedParamsFree` may free, null and 0 included.
    let found = unsafe {
        check(sys::virDomainGetJobStats(domain.as_ptr(), &mut kind, &mut params, &mut count, 0))?;
        let field = sys::VIR_DOMAIN_JOB_OPERATION.as_ptr();
        let found = sys::virTypedParamsGetInt(params, count, field, &mut operation);
        sys::virTypedParamsFree(params, count);
        found
    };
    let runs = matches!(kind as u32, sys::VIR_DOMAIN_JOB_BOUNDED | sys::VIR_DOMAIN_JOB_UNBOUNDED);
    let operation = if found == 1 { operation as u32 } else { sys::VIR_DOMAIN_JOB_OPERATION_UNKNOWN };
    Ok(runs.then_some(operation))
}

/// What the event loop tells us. Delivered on its thread: be quick, and do not call libvirt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// The state of a domain changed.
    Lifecycle { uuid: &'a str },
    /// A block job became ready or ended. `disk` is the target's name.
    BlockJob { uuid: &'a str, disk: &'a str },
    /// The connection is lost; nothing more will be told.
    Closed,
}

type Handler = Box<dyn Fn(Event<'_>) + Send + Sync>;

/// Callbacks registered on one connection. They keep the connection open, as libvirt counts them: without
/// [`Registrations::end`] it would never be closed.
#[derive(Debug, Default)]
pub struct Registrations {
    ids: Vec<c_int>,
    closing: bool,
}

/// Registers `handler` for all that [`Event`] has. The event loop's default implementation must have been registered
/// before `connection` was opened. What could be registered before an error is given back by `end`.
pub fn register<F>(connection: &Connect, handler: F, registrations: &mut Registrations) -> Result<()>
where
    F: Fn(Event<'_>) + Send + Sync + Clone + 'static,
{
    let lifecycle: unsafe extern "C" fn(_, _, _, _, _) -> _ = on_lifecycle;
    let block_job: unsafe extern "C" fn(_, _, _, _, _, _) = on_block_job;
    for (event, callback) in [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, block_job as *const ()),
    ] {
        let opaque = into_opaque(Box::new(handler.clone()));
        // SAFETY: libvirt's interface takes callbacks of every event as one generic function pointer and calls
        // them with the signature that belongs to the event's id, which is that of the function named beside it.
        // `opaque` stays valid until libvirt calls `free_handler`, which it does once, or until we free it on error.
        let id = unsafe {
            let callback = std::mem::transmute::<*const (), sys::virConnectDomainEventGenericCallback>(callback);
            let (conn, any_domain) = (connection.as_ptr(), ptr::null_mut());
            sys::virConnectDomainEventRegisterAny(
                conn,
                any_domain,
                event as c_int,
                callback,
                opaque,
                Some(free_handler),
            )
        };
        registrations.ids.push(check(id).inspect_err(|_| {
            // SAFETY: after a failure libvirt has not kept the pointer.
            unsafe { free_handler(opaque) }
        })?);
    }
    let opaque = into_opaque(Box::new(handler));
    // SAFETY: as above; the callback has the signature the function asks for.
    check(unsafe {
        sys::virConnectRegisterCloseCallback(connection.as_ptr(), Some(on_close), opaque, Some(free_handler))
    })
    .inspect_err(|_| {
        // SAFETY: after a failure libvirt has not kept the pointer.
        unsafe { free_handler(opaque) }
    })?;
    registrations.closing = true;
    Ok(())
}

impl Registrations {
    /// Gives all callbacks back, so that the connection can be closed. Speaks to libvirtd and blocks as long as it
    /// does. Errors are of no consequence: they say that the connection is gone already.
    pub fn end(self, connection: &Connect) {
        for id in self.ids {
            // SAFETY: the id was given by this connection and is given back once.
            unsafe { sys::virConnectDomainEventDeregisterAny(connection.as_ptr(), id) };
        }
        if self.closing {
            // SAFETY: this very callback was registered on this connection.
            unsafe { sys::virConnectUnregisterCloseCallback(connection.as_ptr(), Some(on_close)) };
        }
    }
}

fn check(returned: c_int) -> Result<c_int> {
    if returned < 0 { Err(Error::last_error()) } else { Ok(returned) }
}

fn into_opaque(handler: Handler) -> *mut c_void {
    // Boxed twice: a pointer to a trait object does not fit into a `void *`.
    Box::into_raw(Box::new(handler)).cast()
}

unsafe extern "C" fn free_handler(opaque: *mut c_void) {
    // SAFETY: the pointer came from `into_opaque`, and libvirt calls this once, after the last callback.
    drop(unsafe { Box::from_raw(opaque.cast::<Handler>()) });
}

/// # Safety
/// `opaque` must have come from [`into_opaque`] and not have been freed.
unsafe fn deliver(opaque: *mut c_void, event: Event<'_>) {
    // SAFETY: the caller's promise; the handler is `Sync`, so a shared reference on this thread is fine.
    let handler = unsafe { &*opaque.cast::<Handler>() };
    // A panic has been printed by the hook already; the waiting side asks again by itself.
    let _ = catch_unwind(AssertUnwindSafe(|| handler(event)));
}

/// # Safety
/// `domain` must be valid, as it is during a callback.
unsafe fn uuid_of(domain: sys::virDomainPtr) -> Option<String> {
    const LEN: usize = sys::VIR_UUID_STRING_BUFLEN as usize;
    let mut buffer = [0 as c_char; LEN];
    // SAFETY: the caller's promise; the buffer has the length that libvirt demands. Purely local, no call to libvirtd.
    let text = unsafe {
        if sys::virDomainGetUUIDString(domain, buffer.as_mut_ptr()) < 0 {
            return None;
        }
        CStr::from_ptr(buffer.as_ptr())
    };
    text.to_str().ok().map(str::to_owned)
}

unsafe extern "C" fn on_lifecycle(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _event: c_int,
    _detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a valid domain and the pointer we registered.
    unsafe {
        if let Some(uuid) = uuid_of(domain) {
            deliver(opaque, Event::Lifecycle { uuid: &uuid });
        }
    }
    0
}

unsafe extern "C" fn on_block_job(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    disk: *const c_char,
    _kind: c_int,
    _status: c_int,
    opaque: *mut c_void,
) {
    if disk.is_null() {
        return;
    }
    // SAFETY: libvirt passes a valid domain, a terminated string and the pointer we registered.
    unsafe {
        if let (Some(uuid), Ok(disk)) = (uuid_of(domain), CStr::from_ptr(disk).to_str()) {
            deliver(opaque, Event::BlockJob { uuid: &uuid, disk });
        }
    }
}

unsafe extern "C" fn on_close(_connection: sys::virConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt passes the pointer we registered.
    unsafe { deliver(opaque, Event::Closed) };
}
