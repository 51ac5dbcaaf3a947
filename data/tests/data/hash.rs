//! The numbers are those that the Python in `docs/data.md` prints. They may never change.

use downpour_data::{Salt, hash::mix64};

#[test]
fn keys_are_those_of_the_documented_recipe() {
    for (salt, value, key) in [
        ("C1", "68fd1e64", 0xe377_cfea_d49a_864b),
        ("item", "42", 0x05b8_5a60_24cb_5ec5),
        ("item", "-7", 0xcdc8_0c45_a4c0_9463),
        ("", "Zoë", 0x4f9d_51f7_2bf7_dcb5),
        ("occupation", "Sales", 0xb337_6f45_7811_c108),
        ("age_bucket", "3", 0xc3c1_1d28_470f_8efa),
    ] {
        assert_eq!(Salt::new(salt).key(value.as_bytes()), key, "{salt:?} {value:?}");
    }
}

#[test]
fn crosses_are_those_of_the_documented_recipe() {
    let cross = |salt, values: [&str; 2]| Salt::new(salt).cross(values.map(str::as_bytes));
    assert_eq!(cross("edu_x_occ", ["HS-grad", "Sales"]), 0x1ae7_e416_6a6f_b2fb);
    assert_eq!(cross("edu_x_occ", ["Sales", "HS-grad"]), 0xc14b_ebb8_b4dc_c029);
    assert_eq!(cross("x", ["ab", "c"]), 0xc22d_353f_2b3f_a664);
    assert_eq!(cross("x", ["a", "bc"]), 0xf854_c0a4_0784_0133);
}

#[test]
fn the_mixer_is_the_finaliser_of_splitmix64() {
    // The first three outputs of splitmix64 seeded with 1234567, as published with it.
    let outputs: Vec<u64> = (1..=3_u64)
        .map(|i| mix64(1_234_567_u64.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
        .collect();
    assert_eq!(
        outputs,
        [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
    );
}
