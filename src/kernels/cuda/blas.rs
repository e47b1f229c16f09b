//! Matrix products with cuBLASLt.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{Error, Result};

use super::element::{Element, Pointer};
use super::owned::Owned;
use crate::precision::Precision;

/// Bytes of workspace for cuBLASLt.
const WORKSPACE: usize = 32 << 20;

/// A cuBLASLt handle, and the algorithm selected for each product.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
    plans: RefCell<HashMap<Product, Plan>>,
}

/// A matrix in memory, or a batch of matrices. A matrix has rows of `columns` values, `stride` values
/// apart. The matrices of a batch are `batch_stride` values apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Matrix {
    pub pointer: Pointer,
    pub rows: usize,
    pub columns: usize,
    pub stride: usize,
    pub batch_stride: usize,
    pub element: Element,
}

impl Matrix {
    /// Creates a single contiguous matrix.
    pub fn new(pointer: Pointer, rows: usize, columns: usize, element: Element) -> Self {
        Self { pointer, rows, columns, stride: columns, batch_stride: 0, element }
    }

    /// Creates a batch of matrices, with rows `stride` values apart.
    pub fn batched(self, stride: usize, batch_stride: usize) -> Self {
        Self { stride, batch_stride, ..self }
    }

    /// Returns the alignment of the address in bytes, up to the largest that matters to cuBLASLt.
    fn alignment(&self) -> u32 {
        1 << self.pointer.0.trailing_zeros().min(8)
    }

    /// Replaces the address by its alignment, so that all matrices of one shape and alignment are
    /// equal.
    fn kind(self) -> Self {
        Self { pointer: Pointer(self.alignment().into()), ..self }
    }
}

/// The orientation of a factor: as stored, or transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum As {
    Stored,
    Transposed,
}

/// The options of a product.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    pub batch: usize,
    pub alpha: f32,
    /// Whether the product is added to the values of `d`.
    pub accumulate: bool,
}

impl How {
    /// One matrix, without a factor or accumulation.
    pub const PLAIN: Self = Self { batch: 1, alpha: 1.0, accumulate: false };

    pub const fn accumulating(accumulate: bool) -> Self {
        Self { accumulate, ..Self::PLAIN }
    }
}

/// The properties of a product that select its plan: the shapes of the operands, with alignments in
/// place of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Product {
    a: (Matrix, As),
    b: (Matrix, As),
    d: Matrix,
    batch: usize,
    tf32: bool,
}

/// The cuBLASLt descriptors of a product. cuBLASLt is column-major, where `d` is its own transpose. The
/// product is therefore that of `b` and `a`.
struct Plan {
    description: Description,
    a: Layout,
    b: Layout,
    d: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

type Description = Owned<sys::cublasLtMatmulDesc_t, CublasError>;
type Layout = Owned<sys::cublasLtMatrixLayout_t, CublasError>;

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        // SAFETY: the handle was created by `new` and has not been destroyed.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Blas {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        stream.context().bind_to_thread().w()?;
        // SAFETY: cuBLASLt writes its workspace before it reads it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE).w()? };
        let (stream, plans) = (stream.clone(), RefCell::default());
        Ok(Self { handle: result::create_handle().map_err(Error::wrap)?, workspace, stream, plans })
    }

    /// Computes `d = alpha a b`, or `d += alpha a b` with `accumulate`, for each matrix of the batch.
    ///
    /// # Errors
    /// Returns an error if the shapes do not match, or if cuBLASLt has no algorithm for them.
    pub fn multiply(
        &self,
        precision: Precision,
        (a, a_as): (Matrix, As),
        (b, b_as): (Matrix, As),
        d: Matrix,
        How { batch, alpha, accumulate }: How,
    ) -> Result<()> {
        let shape = |matrix: &Matrix, how| match how {
            As::Stored => (matrix.rows, matrix.columns),
            As::Transposed => (matrix.columns, matrix.rows),
        };
        let ((rows, inner), (b_inner, columns)) = (shape(&a, a_as), shape(&b, b_as));
        if (rows, columns) != (d.rows, d.columns) || inner != b_inner {
            candle_core::bail!("a product of {a:?} and {b:?} in {d:?}")
        }
        let tf32 = precision == Precision::High;
        let product =
            Product { a: (a.kind(), a_as), b: (b.kind(), b_as), d: d.kind(), batch, tf32 };
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry(product) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => {
                place.insert(Plan::new(self.handle, &product).map_err(Error::wrap)?)
            }
        };
        let beta = if accumulate { 1f32 } else { 0.0 };
        let workspace = Pointer::to(&self.workspace, &self.stream);
        // SAFETY: the descriptors are alive. They describe the memory of `a`, `b` and `d`, which the
        // caller keeps alive. Alpha and beta are read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                plan.description.value,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b.pointer.as_ptr(),
                plan.b.value,
                a.pointer.as_ptr(),
                plan.a.value,
                d.pointer.as_ptr(),
                plan.d.value,
                d.pointer.as_ptr(),
                plan.d.value,
                &raw const plan.algorithm,
                workspace.as_ptr(),
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
        .map_err(Error::wrap)
    }
}

impl Plan {
    fn new(
        handle: sys::cublasLtHandle_t,
        product: &Product,
    ) -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB,
        };
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        };
        let compute = if product.tf32 {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let description = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?;
        let description = Owned::new(description, result::destroy_matmul_desc as _);
        let (a, b) = (product.b, product.a);
        for (attribute, how) in
            [(CUBLASLT_MATMUL_DESC_TRANSA, a.1), (CUBLASLT_MATMUL_DESC_TRANSB, b.1)]
        {
            // CUBLAS_OP_N and CUBLAS_OP_T.
            let operation = i32::from(how == As::Transposed);
            // SAFETY: the attribute has this size.
            unsafe {
                result::set_matmul_desc_attribute(
                    description.value,
                    attribute,
                    (&raw const operation).cast(),
                    size_of_val(&operation),
                )?;
            }
        }
        let layout = |matrix: &Matrix| layout(matrix, product.batch);
        let (of_a, of_b, of_d) = (layout(&a.0)?, layout(&b.0)?, layout(&product.d)?);
        let preference =
            Owned::new(result::create_matmul_pref()?, result::destroy_matmul_pref as _);
        // Partial sums must not be added in the type of `d`, which may be half precision.
        let reduction =
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let workspace = WORKSPACE;
        // SAFETY: each attribute has the given size. The descriptors were created above.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference.value,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of_val(&workspace),
            )?;
            result::set_matmul_pref_attribute(
                preference.value,
                CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                (&raw const reduction).cast(),
                size_of_val(&reduction),
            )?;
            for (attribute, matrix) in [
                (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a.0),
                (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b.0),
                (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &product.d),
                (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &product.d),
            ] {
                let alignment = matrix.alignment();
                result::set_matmul_pref_attribute(
                    preference.value,
                    attribute,
                    (&raw const alignment).cast(),
                    size_of_val(&alignment),
                )?;
            }
            result::get_matmul_algo_heuristic(
                handle,
                description.value,
                of_a.value,
                of_b.value,
                of_d.value,
                of_d.value,
                preference.value,
            )?
        };
        // The plan's `a` is that of the product, which is the second factor for cuBLASLt.
        Ok(Self { description, a: of_b, b: of_a, d: of_d, algorithm: found.algo })
    }
}

/// Creates the layout of a row-major matrix, which is column-major for cuBLASLt.
fn layout(matrix: &Matrix, batch: usize) -> std::result::Result<Layout, CublasError> {
    use sys::cublasLtMatrixLayoutAttribute_t::{
        CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
    };
    let element = match matrix.element {
        Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Element::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        Element::F16 => sys::cudaDataType_t::CUDA_R_16F,
    };
    let (rows, columns) = (matrix.columns as u64, matrix.rows as u64);
    let layout = result::create_matrix_layout(element, rows, columns, matrix.stride as i64)?;
    let layout = Owned::new(layout, result::destroy_matrix_layout as _);
    let (count, offset) = (batch as i32, matrix.batch_stride as i64);
    // SAFETY: the attributes have these sizes, and the layout was created above.
    unsafe {
        result::set_matrix_layout_attribute(
            layout.value,
            CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
            (&raw const count).cast(),
            size_of_val(&count),
        )?;
        result::set_matrix_layout_attribute(
            layout.value,
            CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
            (&raw const offset).cast(),
            size_of_val(&offset),
        )?;
    }
    Ok(layout)
}
