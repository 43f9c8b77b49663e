//! Whether jemalloc is there and has read our configuration.

#[cfg(feature = "jemalloc")]
#[test]
fn jemalloc_reads_its_configuration() {
    use zspire_sys::allocator;
    assert_eq!(option::<isize>(c"opt.dirty_decay_ms"), 1000);
    assert_eq!(option::<u32>(c"opt.narenas"), 4);
    assert!(!option::<bool>(c"opt.background_thread"));
    assert!(allocator::start_background());
    assert!(option::<bool>(c"background_thread"));
    drop(std::hint::black_box(vec![1_u8; 64 << 20]));
    allocator::purge();
}

#[cfg(feature = "jemalloc")]
fn option<T: Default>(name: &std::ffi::CStr) -> T {
    let mut value = T::default();
    let mut size = size_of::<T>();
    // SAFETY: the caller names the type that the option has, and its size is checked below.
    let status = unsafe {
        tikv_jemalloc_sys::mallctl(name.as_ptr(), (&raw mut value).cast(), &raw mut size, std::ptr::null_mut(), 0)
    };
    assert_eq!((status, size), (0, size_of::<T>()), "{name:?}");
    value
}
