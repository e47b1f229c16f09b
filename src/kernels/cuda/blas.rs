//! Matrix products by cuBLASLt.

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

/// The bytes that cuBLASLt may work in.
const WORKSPACE: usize = 32 << 20;

/// cuBLASLt, and the algorithm that it chose for each product.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
    plans: RefCell<HashMap<Product, Plan>>,
}

/// A matrix as it lies in memory: rows of `columns` values, `stride` values apart; one for each of a
/// batch, `batch_stride` values apart.
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
    /// Rows one after the other, and one matrix alone.
    pub fn new(pointer: Pointer, rows: usize, columns: usize, element: Element) -> Self {
        Self { pointer, rows, columns, stride: columns, batch_stride: 0, element }
    }

    /// Of each of a batch, rows that are `stride` apart.
    pub fn batched(self, stride: usize, batch_stride: usize) -> Self {
        Self { stride, batch_stride, ..self }
    }

    /// Bytes that its address is a multiple of, as far as cuBLASLt asks.
    fn alignment(&self) -> u32 {
        1 << self.pointer.0.trailing_zeros().min(8)
    }

    /// The same for every matrix of this shape and alignment.
    fn kind(self) -> Self {
        Self { pointer: Pointer(self.alignment().into()), ..self }
    }
}

/// How a factor is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum As {
    Stored,
    Transposed,
}

/// How a product is computed.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    pub batch: usize,
    pub alpha: f32,
    /// Whether it is added to what is there.
    pub accumulate: bool,
}

impl How {
    /// One matrix, the product as it is.
    pub const PLAIN: Self = Self { batch: 1, alpha: 1.0, accumulate: false };

    pub const fn accumulating(accumulate: bool) -> Self {
        Self { accumulate, ..Self::PLAIN }
    }
}

/// What a plan is made for: the operands' shapes, with their alignments in place of their addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Product {
    a: (Matrix, As),
    b: (Matrix, As),
    d: Matrix,
    batch: usize,
    tf32: bool,
}

/// A product's descriptors, in cuBLASLt's order of columns: there `d` is its own transpose, and so the
/// product that of `b` and `a`.
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
        // SAFETY: made by `new`, and not destroyed before.
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

    /// `d = alpha a b`, or with what is in `d` added; for each of a batch.
    ///
    /// # Errors
    /// Returns an error if the shapes do not fit each other, or if cuBLASLt has no algorithm for them.
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
        // SAFETY: the descriptors are alive, and describe the memory of `a`, `b` and `d`, which whoever
        // calls this holds; alpha and beta are read before this returns.
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
            // SAFETY: the attribute is of this size.
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
        // Parts of a sum are never added up in the type of `d`, which may be of half precision.
        let reduction =
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let workspace = WORKSPACE;
        // SAFETY: each attribute is of the size given; the descriptors were made above.
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
        // The plan's `a` is the product's, which is cuBLASLt's second factor.
        Ok(Self { description, a: of_b, b: of_a, d: of_d, algorithm: found.algo })
    }
}

/// A matrix of rows, as cuBLASLt sees it: of as many columns.
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
    // SAFETY: the attributes are of these sizes, and the layout was made above.
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
