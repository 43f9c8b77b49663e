//! jemalloc as the allocator of the process, tuned for one that lives long and whose load comes in bursts.

use std::ptr;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What jemalloc reads before the first allocation.
///
/// Few arenas, since there are few workers and each arena keeps its own free pages; pages unused for a second go back,
/// since a node proxy is paid for by the memory it holds. The heap profiler is there but does not sample until it is
/// switched on. Background threads are not started here, before `main`: see [`start_background`].
#[unsafe(export_name = "malloc_conf")]
pub static CONFIGURATION: Option<&'static libc::c_char> = Some(first_of(
    c"narenas:4,dirty_decay_ms:1000,muzzy_decay_ms:0,max_background_threads:1,prof:true,prof_active:false",
));

/// The address of a C string as a type that a static can have; the option around it is still one thin pointer.
const fn first_of(text: &'static std::ffi::CStr) -> &'static libc::c_char {
    // SAFETY: the pointer is to the first of the string's characters, which live for ever and never change.
    unsafe { &*text.as_ptr() }
}

/// `MALLCTL_ARENAS_ALL`: the index that stands for every arena.
const PURGE_ALL: &std::ffi::CStr = c"arena.4096.purge";

/// Starts the thread that gives unused pages back while the process is idle.
///
/// Call it once privileges are settled: a thread that exists earlier would keep capabilities that the process has
/// given up, and a process with threads cannot enter a user namespace. Returns whether it runs.
pub fn start_background() -> bool {
    let mut on = true;
    // SAFETY: the name ends with a zero and the option is a boolean, whose address and size are given.
    let status = unsafe {
        tikv_jemalloc_sys::mallctl(
            c"background_thread".as_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            (&raw mut on).cast(),
            size_of::<bool>(),
        )
    };
    status == 0
}

/// Gives all unused pages back to the system now, as after a burst of load.
pub fn purge() {
    // SAFETY: this control takes no value and gives none.
    unsafe {
        tikv_jemalloc_sys::mallctl(PURGE_ALL.as_ptr(), ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), 0);
    }
}
