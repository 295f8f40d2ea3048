//! A tour of the crate: memory on two devices, copies, views, and the pool.

use std::sync::atomic::{AtomicUsize, Ordering};

use pomona_device::{ArenaDevice, DType, Device, DeviceError, HostDevice, HostMemory, Pool};

#[test]
fn memory_is_reached_through_its_device_only() {
    let host = HostDevice::new();
    let arena = ArenaDevice::new(1 << 20).unwrap();
    for device in [&host as &dyn Device, &arena] {
        // Fresh memory is zero; views are shaped windows on it.
        let view = device.alloc_view(DType::U32, &[4, 2]).unwrap();
        let row = view.rows(1, 2);
        device.upload(&[7; 16], &row).unwrap();
        let mut bytes = [1; 32];
        device.download(&view, &mut bytes).unwrap();
        assert_eq!(
            (&bytes[..8], &bytes[8..24], &bytes[24..]),
            (&[0; 8][..], &[7; 16][..], &[0; 8][..])
        );
        // Lengths must match.
        assert!(matches!(device.upload(&[0; 3], &row), Err(DeviceError::Mismatch(_))));
    }
    // A view of one device is refused by another.
    let view = host.alloc_view(DType::F32, &[1]).unwrap();
    assert!(matches!(arena.upload(&[0; 4], &view), Err(DeviceError::WrongDevice { .. })));
    // The arena is full at some point, and says so.
    assert!(matches!(arena.alloc(2 << 20), Err(DeviceError::OutOfMemory { .. })));
}

#[test]
fn a_mapped_file_can_be_read_again_after_its_pages_went() {
    let path = std::env::temp_dir().join(format!("pomona-map-{}", std::process::id()));
    let content: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let bytes = pomona_device::map_file(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    for range in [0..0, 0..100_000, 5_000..60_001, 0..200_000] {
        bytes.done_with(range);
        assert_eq!((*bytes).as_ref(), content);
    }
}

/// The arena's promise: outside an operation its memory faults. The access runs in a child
/// process, which is this test started again.
#[test]
fn touching_the_arena_from_outside_is_a_fault() {
    const CHILD: &str = "POMONA_TEST_TOUCH_ARENA";
    let arena = ArenaDevice::new(1 << 16).unwrap();
    let buffer = arena.alloc(64).unwrap();
    if std::env::var_os(CHILD).is_some() {
        // SAFETY: none is claimed: this read must end the process.
        let byte = unsafe { buffer.base().as_ptr().read_volatile() };
        println!("read {byte}");
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "touching_the_arena_from_outside_is_a_fault"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert!(!output.status.success(), "the arena was read from outside");
    #[cfg(unix)]
    {
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(output.status.signal(), Some(11));
    }
    // While an operation has entered, the same read is fine.
    let access = arena.enter();
    let view = pomona_device::View::new(buffer, 0, DType::U8, &[64]).unwrap();
    // SAFETY: the only slice of this access.
    assert_eq!(unsafe { access.read::<u8>(&view) }.unwrap()[0], 0);
}

#[test]
fn a_pool_joins_its_workers() {
    let pool = Pool::new(2);
    let sum = AtomicUsize::new(0);
    pool.run(&|worker| {
        let mine = pomona_device::split(100, 1, 2, worker);
        sum.fetch_add(mine.sum(), Ordering::Relaxed);
    });
    assert_eq!(sum.into_inner(), 99 * 100 / 2);
}
