//! LibTorch's memory as slices: what is gathered goes straight into a tensor, and gradients are read where they are.

#![allow(
    unsafe_code,
    reason = "LibTorch hands out its memory as plain pointers; this module wraps them"
)]

use tch::{Device, Kind, Tensor};

use crate::Result;

/// A new tensor on the CPU, zeros before `fill`.
pub(crate) fn filled(shape: &[i64], fill: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    let tensor = Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?;
    if tensor.numel() > 0 {
        // SAFETY: the tensor is new, contiguous and of floats; nobody else has it before this function returns.
        fill(unsafe {
            std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel())
        });
    }
    Ok(tensor)
}

/// Reads a tensor as rows of its last dimension, each beginning so many floats after the one before.
pub(crate) fn with_rows<T>(tensor: &Tensor, read: impl FnOnce(&[f32], usize) -> T) -> Result<T> {
    let width = tensor.size().last().copied().unwrap_or(1);
    let mut tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
    // The gradient of something that was concatenated is a column of the whole's.
    let stride = match (tensor.size().as_slice(), tensor.stride().as_slice()) {
        ([_, _], [stride, 1]) if *stride >= width => *stride as usize,
        _ => {
            tensor = tensor.f_contiguous()?;
            width as usize
        }
    };
    let rows = if tensor.numel() == 0 { 0 } else { tensor.numel() / width as usize };
    if rows == 0 {
        return Ok(read(&[], stride));
    }
    let floats = (rows - 1) * stride + width as usize;
    // SAFETY: a float tensor on the CPU whose last element is `floats` after the first; it lives, and is not written to, during the call.
    Ok(read(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), floats) }, stride))
}

/// Tells the C library to keep freed memory for the next step. Left alone it gives the large tensors of a step back to the system, which clears
/// every page of them for the next one. For the beginning of a program that trains; it holds for the whole process.
pub fn keep_memory() {
    unsafe extern "C" {
        safe fn mallopt(parameter: i32, value: i32) -> i32;
    }
    const M_TRIM_THRESHOLD: i32 = -1;
    const M_MMAP_THRESHOLD: i32 = -3;
    // It answers 0 where it does not know the parameter: then nothing changes.
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_whatever_lies_between_them() {
        let all = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
        let rows = |tensor: &Tensor| {
            let width = tensor.size()[1] as usize;
            with_rows(tensor, |floats, stride| {
                floats.chunks(stride).map(|row| row[..width].to_vec()).collect::<Vec<_>>()
            })
            .unwrap()
        };
        assert_eq!(rows(&all.narrow(1, 1, 2)), [[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]]);
        assert_eq!(
            rows(&all.tr()),
            [[0.0, 4.0, 8.0], [1.0, 5.0, 9.0], [2.0, 6.0, 10.0], [3.0, 7.0, 11.0]]
        );
        assert_eq!(rows(&Tensor::from(7.0f32).expand([2, 2], false)), [[7.0, 7.0], [7.0, 7.0]]);
        assert!(rows(&all.narrow(0, 0, 0)).is_empty());
    }

    #[test]
    fn a_filled_tensor_holds_what_was_written() {
        let tensor = filled(&[2, 2], |floats| floats[3] = 5.0).unwrap();
        assert_eq!(Vec::<f32>::try_from(tensor.view(-1)).unwrap(), [0.0, 0.0, 0.0, 5.0]);
        assert_eq!(filled(&[0, 2], |_| unreachable!()).unwrap().size(), [0, 2]);
    }
}
