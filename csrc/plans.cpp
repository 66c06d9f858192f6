#include "plans.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "cublaslt.hpp"
#include "cuda.hpp"
#include "matmul.hpp"

namespace lltm_ray::cuda {
namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t(32) << 20, kMostWorkspaces = 16, kMostPlans = 1024;
constexpr int kMostDevices = 64, kMostProposals = 12, kTimedRuns = 5;

struct Hash {
  std::size_t operator()(const PlanKey &key) const {
    std::uint64_t words[sizeof(key) / 8], hash = 0x9e3779b97f4a7c15u;
    std::memcpy(words, &key, sizeof(key));
    for (const std::uint64_t word : words) {
      hash = (hash ^ word) * 0xff51afd7ed558ccdu;
      hash ^= hash >> 32;
    }
    return hash;
  }
};
struct Equal {
  bool operator()(const PlanKey &left, const PlanKey &right) const { return !std::memcmp(&left, &right, sizeof(left)); }
};

struct Plan {
  // cuBLASLt reads them through pointers without `const`
  mutable cublasLtMatmulDescOpaque_t desc;
  mutable cublasLtMatrixLayoutOpaque_t a, b, d;
  cublasLtMatmulAlgo_t algorithm;
  std::size_t workspace_bytes;
  bool finished;  // the bias and the activation are part of it
};

// What is kept for one device. Calls that are under way hold it, so that it can be let go at any time.
struct Context {
  cublasLtHandle_t handle = nullptr;
  std::mutex mutex;
  std::unordered_map<PlanKey, std::shared_ptr<const Plan>, Hash, Equal> plans;
  std::vector<std::pair<Stream, std::shared_ptr<Storage>>> workspaces;  // two streams must not share one

  Context() { check(cublaslt().create(&handle), "cublasLtCreate"); }
  ~Context() { (void)cublaslt().destroy(handle); }
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;
};

std::mutex contexts_mutex;
std::shared_ptr<Context> *contexts() {  // never destroyed: the driver may be gone by then
  static auto *kept = new std::shared_ptr<Context>[kMostDevices];
  return kept;
}

std::shared_ptr<Context> context_of(Place place) {
  if (place.cuda >= kMostDevices) fail(ErrorKind::device, place.text() + ": only 64 devices are supported");
  const std::lock_guard<std::mutex> lock(contexts_mutex);
  auto &kept = contexts()[place.cuda];
  if (!kept) kept = std::make_shared<Context>();
  return kept;
}

struct Types {
  cudaDataType_t in, out, scale;
  cublasComputeType_t compute;
};

Types types_of(const PlanKey &key) {
  switch (static_cast<DType>(key.dtype)) {
    case DType::float16: return {CUDA_R_16F, CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F};
    case DType::bfloat16: return {CUDA_R_16BF, CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F};
    case DType::int8: return {CUDA_R_8I, CUDA_R_32I, CUDA_R_32I, CUBLAS_COMPUTE_32I};
    default: return {CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, key.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F};
  }
}

cublasLtEpilogue_t epilogue_of(const PlanKey &key) {
  const auto activation = static_cast<Activation>(key.activation);
  if (activation == Activation::relu) return key.bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
  if (activation == Activation::gelu) return key.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
  return key.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}

template <class T>
void set(cublasLtMatmulDescOpaque_t &desc, cublasLtMatmulDescAttributes_t which, T value) {
  check(cublaslt().set_desc(&desc, which, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
}

void describe(cublasLtMatmulDescOpaque_t &desc, const PlanKey &key, bool finished, const void *bias) {
  const Types types = types_of(key);
  check(cublaslt().init_desc(&desc, sizeof(desc), types.compute, types.scale), "cublasLtMatmulDescInit");
  set<std::int32_t>(desc, CUBLASLT_MATMUL_DESC_TRANSA, key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set<std::int32_t>(desc, CUBLASLT_MATMUL_DESC_TRANSB, key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (!finished) return;
  set<std::uint32_t>(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(key));
  if (key.bias) set<const void *>(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
}

void lay_out(cublasLtMatrixLayoutOpaque_t &layout, cudaDataType_t type, const PlanKey &key, std::int64_t rows,
             std::int64_t columns, std::int64_t lead, std::int64_t step) {
  const auto &lt = cublaslt();
  check(lt.init_layout(&layout, sizeof(layout), type, rows, columns, lead), "cublasLtMatrixLayoutInit");
  if (key.batch == 1) return;
  if (key.batch > INT32_MAX) fail(ErrorKind::shape, "batch=" + std::to_string(key.batch) + ": at most 2^31 - 1");
  const auto batch = static_cast<std::int32_t>(key.batch);
  check(lt.set_layout(&layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof(batch)), "batch count");
  check(lt.set_layout(&layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step, sizeof(step)), "batch offset");
}

template <class T>
void prefer(cublasLtMatmulPreferenceOpaque_t &preference, cublasLtMatmulPreferenceAttributes_t which, T value) {
  check(cublaslt().set_preference(&preference, which, &value, sizeof(value)), "cublasLtMatmulPreferenceSetAttribute");
}

int propose(const Context &context, const PlanKey &key, const Plan &plan, cublasLtMatmulHeuristicResult_t *found,
            int most) {
  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublaslt().init_preference(&preference, sizeof(preference)), "cublasLtMatmulPreferenceInit");
  prefer<std::uint64_t>(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  prefer<std::uint32_t>(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 1u << key.align_a);
  prefer<std::uint32_t>(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 1u << key.align_b);
  prefer<std::uint32_t>(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 1u << key.align_d);
  prefer<std::uint32_t>(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 1u << key.align_d);
  const auto dtype = static_cast<DType>(key.dtype);
  if (dtype == DType::float16 || dtype == DType::bfloat16) {  // parts of a sum are added in float32, never in 16 bits
    prefer<std::uint32_t>(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                          CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
  }
  int count = 0;
  const auto status = cublaslt().heuristic(context.handle, &plan.desc, &plan.a, &plan.b, &plan.d, &plan.d, &preference,
                                           most, found, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return 0;
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  const auto usable = [](const auto &proposal) { return proposal.state == CUBLAS_STATUS_SUCCESS; };
  return static_cast<int>(std::stable_partition(found, found + count, usable) - found);
}

std::shared_ptr<Storage> workspace_for(Context &context, Place place, Stream stream) {
  bool full;
  {
    const std::lock_guard<std::mutex> lock(context.mutex);
    for (const auto &each : context.workspaces) {
      if (each.first == stream) return each.second;
    }
    full = context.workspaces.size() >= kMostWorkspaces;
  }
  if (full) return Storage::allocate(place, kWorkspaceBytes, stream);  // freed after the product
  auto made = Storage::allocate(place, kWorkspaceBytes, 0);            // not of `stream`, which may be gone before it
  made->share();
  order_streams(place, 0, place, stream);
  const std::lock_guard<std::mutex> lock(context.mutex);
  if (context.workspaces.size() < kMostWorkspaces) context.workspaces.emplace_back(stream, made);
  return made;
}

cublasStatus_t enqueue(Context &context, const PlanKey &key, const Plan &plan, const Operands &operands, Place place,
                       Stream stream) {
  static constexpr std::int32_t kOne = 1, kZero = 0;
  static constexpr float kOneFloat = 1.f, kZeroFloat = 0.f;
  const bool whole = static_cast<DType>(key.dtype) == DType::int8;
  const void *one = whole ? static_cast<const void *>(&kOne) : &kOneFloat;
  const void *zero = whole ? static_cast<const void *>(&kZero) : &kZeroFloat;
  std::shared_ptr<Storage> workspace;
  if (plan.workspace_bytes) workspace = workspace_for(context, place, stream);
  cublasLtMatmulDescOpaque_t *desc = &plan.desc;
  cublasLtMatmulDescOpaque_t with_bias;
  if (plan.finished && key.bias) {
    describe(with_bias, key, true, operands.bias);
    desc = &with_bias;
  }
  return cublaslt().matmul(context.handle, desc, one, operands.a, &plan.a, operands.b, &plan.b, zero, operands.d,
                           &plan.d, operands.d, &plan.d, &plan.algorithm, workspace ? workspace->data : nullptr,
                           plan.workspace_bytes, handle(stream));
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { (void)cudaEventDestroy(event); }
  Event(const Event &) = delete;
  Event &operator=(const Event &) = delete;
};

// Milliseconds of kTimedRuns products; infinite for an algorithm that refuses the problem.
float timed(Context &context, const PlanKey &key, const Plan &plan, const Operands &operands, Place place,
            Stream stream) {
  Event start, stop;
  if (enqueue(context, key, plan, operands, place, stream) != CUBLAS_STATUS_SUCCESS) return HUGE_VALF;
  check(cudaEventRecord(start.event, handle(stream)), "cudaEventRecord");
  for (int run = 0; run < kTimedRuns; ++run) {
    check(enqueue(context, key, plan, operands, place, stream), "cublasLtMatmul");
  }
  check(cudaEventRecord(stop.event, handle(stream)), "cudaEventRecord");
  check(cudaEventSynchronize(stop.event), "cudaEventSynchronize");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, start.event, stop.event), "cudaEventElapsedTime");
  return ms;
}

void take(Plan &plan, const cublasLtMatmulHeuristicResult_t &proposal) {
  plan.algorithm = proposal.algo;
  plan.workspace_bytes = proposal.workspaceSize;
}

std::shared_ptr<const Plan> make_plan(Context &context, const PlanKey &key, const Operands &operands, Place place,
                                      Stream stream) {
  auto plan = std::make_shared<Plan>();
  const Types types = types_of(key);
  const bool ta = key.transpose_a, tb = key.transpose_b;
  lay_out(plan->a, types.in, key, ta ? key.k : key.m, ta ? key.m : key.k, key.lead_a, key.step_a);
  lay_out(plan->b, types.in, key, tb ? key.n : key.k, tb ? key.k : key.n, key.lead_b, key.step_b);
  lay_out(plan->d, types.out, key, key.m, key.n, key.lead_d, key.step_d);
  cublasLtMatmulHeuristicResult_t proposals[kMostProposals] = {};
  int count = 0;
  const bool plain = !key.bias && key.activation == 0;
  for (const bool finished : {true, false}) {
    if (count > 0 || (plain && !finished)) break;
    plan->finished = finished;
    describe(plan->desc, key, finished, operands.bias);
    count = propose(context, key, *plan, proposals, key.tune ? kMostProposals : 1);
  }
  if (count == 0) {
    fail(ErrorKind::native, "cuBLASLt has no algorithm for a product of " + std::to_string(key.n) + " x " +
                                std::to_string(key.k) + " x " + std::to_string(key.m) + " of " +
                                name(static_cast<DType>(key.dtype)) + " on this device");
  }
  take(*plan, proposals[0]);
  float best = HUGE_VALF;
  int chosen = 0;
  for (int each = 0; count > 1 && each < count; ++each) {
    take(*plan, proposals[each]);
    const float ms = timed(context, key, *plan, operands, place, stream);
    if (ms < best) best = ms, chosen = each;
  }
  take(*plan, proposals[chosen]);
  return plan;
}

}  // namespace

bool run_planned(const PlanKey &key, const Operands &operands, Place place, Stream stream) {
  const auto context = context_of(place);
  std::shared_ptr<const Plan> plan;
  {
    const std::lock_guard<std::mutex> lock(context->mutex);
    const auto found = context->plans.find(key);
    if (found != context->plans.end()) plan = found->second;
  }
  if (!plan) {
    plan = make_plan(*context, key, operands, place, stream);
    const std::lock_guard<std::mutex> lock(context->mutex);
    if (context->plans.size() >= kMostPlans) context->plans.clear();
    context->plans.emplace(key, plan);
  }
  check(enqueue(*context, key, *plan, operands, place, stream), "cublasLtMatmul");
  return plan->finished;
}

void release_matmul() {
  const std::lock_guard<std::mutex> lock(contexts_mutex);
  for (int index = 0; index < kMostDevices; ++index) contexts()[index].reset();
}

std::size_t plans(int index) {
  const std::lock_guard<std::mutex> lock(contexts_mutex);
  const auto &context = contexts()[index];
  if (!context) return 0;
  const std::lock_guard<std::mutex> inner(context->mutex);
  return context->plans.size();
}

}  // namespace lltm_ray::cuda
