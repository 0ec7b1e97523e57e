//! XXH64 (Collet, xxHash specification 0.1.1), seed 0: finds damaged files at the speed of memory.

const P1: u64 = 0x9E37_79B1_85EB_CA87;
const P2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const P3: u64 = 0x1656_67B1_9E37_79F9;
const P4: u64 = 0x85EB_CA77_C2B2_AE63;
const P5: u64 = 0x27D4_EB2F_1656_67C5;
const STRIPE: usize = 32;

/// Takes bytes in any portions and gives one number.
pub(crate) struct Xxh64 {
    lanes: [u64; 4],
    rest: [u8; STRIPE],
    rest_len: usize,
    total: u64,
}

impl Xxh64 {
    pub(crate) fn new() -> Self {
        Self {
            lanes: [P1.wrapping_add(P2), P2, 0, 0u64.wrapping_sub(P1)],
            rest: [0; STRIPE],
            rest_len: 0,
            total: 0,
        }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        self.total += bytes.len() as u64;
        if self.rest_len > 0 {
            let taken = bytes.len().min(STRIPE - self.rest_len);
            self.rest[self.rest_len..self.rest_len + taken].copy_from_slice(&bytes[..taken]);
            self.rest_len += taken;
            bytes = &bytes[taken..];
            if self.rest_len < STRIPE {
                return;
            }
            let stripe = self.rest;
            self.mix(&stripe);
            self.rest_len = 0;
        }
        let mut stripes = bytes.chunks_exact(STRIPE);
        for stripe in &mut stripes {
            self.mix(stripe);
        }
        let rest = stripes.remainder();
        self.rest[..rest.len()].copy_from_slice(rest);
        self.rest_len = rest.len();
    }

    fn mix(&mut self, stripe: &[u8]) {
        for (lane, word) in self.lanes.iter_mut().zip(stripe.chunks_exact(8)) {
            *lane = round(*lane, word_of(word));
        }
    }

    pub(crate) fn finish(&self) -> u64 {
        let [a, b, c, d] = self.lanes;
        let mut hash = if self.total < STRIPE as u64 {
            P5
        } else {
            let sum = a.rotate_left(1).wrapping_add(b.rotate_left(7));
            let sum = sum
                .wrapping_add(c.rotate_left(12))
                .wrapping_add(d.rotate_left(18));
            self.lanes.iter().fold(sum, |hash, &lane| {
                (hash ^ round(0, lane)).wrapping_mul(P1).wrapping_add(P4)
            })
        };
        hash = hash.wrapping_add(self.total);
        let mut words = self.rest[..self.rest_len].chunks_exact(8);
        for word in &mut words {
            hash = (hash ^ round(0, word_of(word)))
                .rotate_left(27)
                .wrapping_mul(P1)
                .wrapping_add(P4);
        }
        let mut rest = words.remainder();
        if let Some((half, after)) = rest.split_at_checked(4) {
            let half = half.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
            hash = (hash ^ half.wrapping_mul(P1))
                .rotate_left(23)
                .wrapping_mul(P2)
                .wrapping_add(P3);
            rest = after;
        }
        for &byte in rest {
            hash = (hash ^ u64::from(byte).wrapping_mul(P5))
                .rotate_left(11)
                .wrapping_mul(P1);
        }
        hash = (hash ^ (hash >> 33)).wrapping_mul(P2);
        hash = (hash ^ (hash >> 29)).wrapping_mul(P3);
        hash ^ (hash >> 32)
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

fn round(lane: u64, word: u64) -> u64 {
    lane.wrapping_add(word.wrapping_mul(P2))
        .rotate_left(31)
        .wrapping_mul(P1)
}

#[cfg(test)]
mod tests {
    use super::Xxh64;

    fn hash(portions: &[&[u8]]) -> u64 {
        let mut state = Xxh64::new();
        for portion in portions {
            state.update(portion);
        }
        state.finish()
    }

    #[test]
    fn values_are_those_of_the_reference_implementation() {
        assert_eq!(hash(&[b""]), 0xEF46_DB37_51D8_E999);
        assert_eq!(hash(&[b"a"]), 0xD24E_C4F1_A98C_6E5B);
        assert_eq!(hash(&[b"abc"]), 0x44BC_2CF5_AD77_0999);
        assert_eq!(
            hash(&[b"Nobody inspects the spammish repetition"]),
            0xFBCE_A83C_8A37_8BF1
        );
    }

    #[test]
    fn portions_do_not_matter() {
        let bytes: Vec<u8> = (0..200u8).collect();
        let whole = hash(&[&bytes]);
        for cut in 0..bytes.len() {
            let (a, b) = bytes.split_at(cut);
            assert_eq!(hash(&[a, b]), whole, "cut at {cut}");
        }
    }
}
