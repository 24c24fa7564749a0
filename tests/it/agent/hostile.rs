//! Hostile input: it ends the session, and never costs memory. What is counted is what each thread holds.

use super::*;

/// Counts what each thread holds, so that "bounded" can be measured.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    // Gone while a thread ends; nobody measures then.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches two plain cells.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// splitmix64: a seed is the whole state.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn random_input_never_panics_and_never_costs_memory() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    });
    println!("SEED={seed}");
    let mut random = seed;
    let banner_len = wire::Banner::ours().line(Role::Client).len();
    for round in 0..1000 {
        let mut input = spoken();
        match next(&mut random) % 4 {
            // Changed bytes, most of them behind the banner.
            0 => {
                for _ in 0..=next(&mut random) % 4 {
                    let at = banner_len + next(&mut random) as usize % (input.len() - banner_len);
                    input[at] = next(&mut random) as u8;
                }
            }
            // A stretch lost or said twice.
            1 => {
                let at = next(&mut random) as usize % input.len();
                let length = (next(&mut random) as usize % 64).min(input.len() - at);
                match next(&mut random) % 2 {
                    0 => drop(input.drain(at..at + length)),
                    _ => {
                        let again = input[at..at + length].to_vec();
                        input.splice(at..at, again);
                    }
                }
            }
            // Well-formed frames with anything inside.
            2 => {
                input.truncate(banner_len);
                for _ in 0..20 {
                    let kinds = [1u8, 2, 3, 4, 5, 0x10, 0x81, 0x83, 0x87, 0x99];
                    let length = next(&mut random) as usize % 300;
                    input.extend_from_slice(&(length as u32).to_le_bytes());
                    input.extend_from_slice(&[kinds[next(&mut random) as usize % kinds.len()], 0, 0, 0]);
                    input.extend_from_slice(&(next(&mut random) % 4).to_le_bytes());
                    input.extend((0..length).map(|_| next(&mut random) as u8));
                }
            }
            // Noise from the first byte.
            _ => input = (0..next(&mut random) % 2000).map(|_| next(&mut random) as u8).collect(),
        }
        let opener = FakeOpener(Arc::default());
        let before = HELD.with(Cell::get);
        PEAK.with(|peak| peak.set(before));
        // No goodbye, or a broken one; either way it returns.
        let _ = serve(&input[..], std::io::sink(), &opener, quick_serve());
        let cost = PEAK.with(Cell::get) - before;
        assert!(cost < 2 << 20, "SEED={seed}, round {round}: {cost} bytes");
    }
}

/// JSON costs more than its text once parsed; the request's limit must hold for the worst of it.
#[test]
fn the_largest_request_is_parsed_in_bounded_memory() {
    let wide = format!("{{\"find\":{{\"name\":\"{}\"}}}}", "x".repeat(wire::REQUEST_MAX - 40));
    let deep = "[".repeat(wire::REQUEST_MAX);
    let disks = r#"{"name":"a","size":1,"fresh":true,"reserve_bytes":1},"#.repeat(4000);
    let many = format!(
        "{{\"begin\":{{\"replica\":0,\"request\":{{\"uuid\":\"{UUID}\",\"name\":\"a\",\"run\":\"0000000000000000\",\
         \"generation\":1,\"expected_head\":null,\"disks\":[{}]}}}}}}",
        disks.trim_end_matches(',')
    );
    let blocks =
        format!("{{\"pieces\":{{\"replica\":0,\"disk\":\"a\",\"blocks\":[{}]}}}}", vec!["1"; 120_000].join(","));
    for payload in [wide, deep, many, blocks] {
        let mut input = wire::Banner::ours().line(Role::Client).into_bytes();
        let head = Head { kind: FrameKind::Request, more: false, id: 1 };
        wire::write_frame(&mut input, head, &[], payload.as_bytes()).unwrap();
        let before = HELD.with(Cell::get);
        PEAK.with(|peak| peak.set(before));
        let _ = serve(&input[..], std::io::sink(), &FakeOpener(Arc::default()), quick_serve());
        let cost = PEAK.with(Cell::get) - before;
        assert!(cost < 2 << 20, "{cost} bytes for {}...", &payload[..30]);
        // The meter works: the text itself was held.
        assert!(cost > 100 << 10, "{cost} bytes for {}...", &payload[..30]);
    }
}
