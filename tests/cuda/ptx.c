/* Kernels on the emulated device: PTX, executed one instruction after another, a warp of 32 threads in lockstep.
 *
 * It knows the instructions that tierd's kernels have, on integers, and refuses a module with any other. What a GPU would not forgive
 * fails here too: another number of threads than the PTX demands, memory that is not this device's, an address that is no multiple of
 * what is read there, threads of a warp that part (a GPU would go on; these kernels never do). Semantics: NVIDIA's PTX ISA, chapter 9.
 * Settings, by environment variables: STUB_CUDA_PTX_REFUSED (no module can be loaded), STUB_CUDA_KERNELS_LIE (a word that is stored
 * alone, such as a digest, has a wrong bit).
 */

#define _GNU_SOURCE
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 32, NAMES_MAX = 2048, INSTRUCTIONS_MAX = 4096, OPERANDS_MAX = 6, PARAMETERS_MAX = 16 };

/* What most instructions do with a lane's operands a, b and c. A register of 32 bits has zeros above them. */
#define U32(x) (uint32_t)(x)
#define S32(x) (int32_t)(x)
#define S64(x) (int64_t)(x)
#define COMPUTED \
    OP(ADD_32, "add.s32", U32(a + b)) OP(ADD_64, "add.s64", a + b) OP(SUB_32, "sub.s32", U32(a - b)) OP(SUB_64, "sub.s64", a - b) \
    OP(AND_32, "and.b32", U32(a & b)) OP(AND_64, "and.b64", a & b) OP(AND_P, "and.pred", a & b) \
    OP(OR_32, "or.b32", U32(a | b)) OP(OR_64, "or.b64", a | b) OP(XOR_32, "xor.b32", U32(a ^ b)) OP(XOR_64, "xor.b64", a ^ b) \
    OP(SHL_32, "shl.b32", b > 31 ? 0 : U32(a << b)) OP(SHL_64, "shl.b64", b > 63 ? 0 : a << b) \
    OP(SHR_U32, "shr.u32", b > 31 ? 0 : U32(a) >> b) OP(SHR_U64, "shr.u64", b > 63 ? 0 : a >> b) \
    OP(SHR_S32, "shr.s32", U32(S32(a) >> (b > 31 ? 31 : b))) \
    OP(BFE_U32, "bfe.u32", b > 31 || !c ? 0 : U32(a) >> b & (c > 31 ? ~0u : (1u << c) - 1)) \
    OP(MUL_LO_64, "mul.lo.s64", a * b) OP(MAD_LO_64, "mad.lo.s64", a * b + c) \
    OP(MUL_HI_U64, "mul.hi.u64", (uint64_t)((unsigned __int128)a * b >> 64)) \
    OP(MUL_WIDE_U32, "mul.wide.u32", (uint64_t)U32(a) * U32(b)) OP(MUL_WIDE_S32, "mul.wide.s32", S64(S32(a)) * S32(b)) \
    OP(MAD_WIDE_U32, "mad.wide.u32", (uint64_t)U32(a) * U32(b) + c) OP(MAD_WIDE_S32, "mad.wide.s32", S64(S32(a)) * S32(b) + c) \
    OP(CVT_U64_U32, "cvt.u64.u32", U32(a)) OP(CVT_S64_S32, "cvt.s64.s32", S64(S32(a))) OP(CVT_U32_U64, "cvt.u32.u64", U32(a)) \
    OP(MOV_32, "mov.u32", U32(a)) OP(MOV_B32, "mov.b32", U32(a)) OP(MOV_64, "mov.u64", a) \
    OP(LD_PARAM_32, "ld.param.b32", U32(a)) OP(LD_PARAM_64, "ld.param.b64", a) \
    OP(LT_S32, "setp.lt.s32", S32(a) < S32(b)) OP(GT_S32, "setp.gt.s32", S32(a) > S32(b)) OP(GE_S32, "setp.ge.s32", S32(a) >= S32(b)) \
    OP(EQ_B32, "setp.eq.b32", U32(a) == U32(b)) OP(NE_B32, "setp.ne.b32", U32(a) != U32(b)) OP(NE_B64, "setp.ne.b64", a != b) \
    OP(SELP_64, "selp.b64", c ? a : b)
#define OTHERS \
    OP(MOV_B64, "mov.b64", 0) OP(LOAD, "ld.global.b64", 0) OP(LOAD_2, "ld.global.v2.b64", 0) OP(STORE, "st.global.b64", 0) \
    OP(STORE_2, "st.global.v2.b64", 0) OP(SHFL_IDX, "shfl.sync.idx.b32", 0) OP(SHFL_BFLY, "shfl.sync.bfly.b32", 0) \
    OP(BRA, "bra", 0) OP(BRA_UNI, "bra.uni", 0) OP(RET, "ret", 0)

#define OP(code, name, value) code,
enum code { COMPUTED OTHERS CODES };
#undef OP
#define OP(code, name, value) name,
static const char *const code_names[] = {COMPUTED OTHERS};
#undef OP

/* Operands are numbers of registers: a number in the text, a parameter and %tid.x are registers too, whose value is set at the start. */
struct instruction { enum code code; int guard, count, at[OPERANDS_MAX]; };  /* guard: the predicate's register, or -1 */
struct CUfunc_st {
    char name[64], names[NAMES_MAX][40];
    int name_count, instruction_count, labels[NAMES_MAX], is_number[NAMES_MAX], threads, parameter_count, parameters[PARAMETERS_MAX];
    size_t parameter_bytes[PARAMETERS_MAX];
    uint64_t numbers[NAMES_MAX];
    struct instruction instructions[INSTRUCTIONS_MAX];
};
struct CUmod_st { struct CUfunc_st function; };

enum { NOTHING, BLOCK_X, BLOCK_Y, THREAD };  /* the first registers; nothing: operands that an instruction does not have */
static const char *const first_names[] = {"(nothing)", "%ctaid.x", "%ctaid.y", "%tid.x"};

/* -- reading ------------------------------------------------------------------------------------------------------- */

static int named(struct CUfunc_st *f, const char *name) {
    for (int at = 0; at < f->name_count; at++)
        if (!strcmp(f->names[at], name)) return at;
    if (f->name_count == NAMES_MAX || strlen(name) >= sizeof f->names[0]) return 0;
    strcpy(f->names[f->name_count], name);
    f->labels[f->name_count] = -1;
    f->is_number[f->name_count] = strchr("-0123456789", *name) != NULL;
    f->numbers[f->name_count] = *name == '-' ? (uint64_t)strtoll(name, NULL, 0) : strtoull(name, NULL, 0);
    return f->name_count++;
}

static int read_instruction(struct CUfunc_st *f, char *statement) {  /* returns whether it is a known one */
    char *rest, *word = strtok_r(statement, " \t\n,[]{}+", &rest);
    for (; word && word[strlen(word) - 1] == ':'; word = strtok_r(NULL, " \t\n,[]{}+", &rest)) {
        word[strlen(word) - 1] = 0;
        f->labels[named(f, word)] = f->instruction_count;
    }
    if (!word || !strcmp(word, ".reg")) return 1;
    if (f->instruction_count == INSTRUCTIONS_MAX) return 0;
    struct instruction *i = &f->instructions[f->instruction_count++];
    i->guard = *word == '@' ? named(f, word + 1) : -1;
    if (*word == '@') word = strtok_r(NULL, " \t\n,[]{}+", &rest);
    for (i->code = 0; i->code < CODES && strcmp(code_names[i->code], word);) i->code++;
    if (i->code == CODES) return fprintf(stderr, "ptx.c does not know %s\n", word), 0;
    while ((word = strtok_r(NULL, " \t\n,[]{}+", &rest)) && i->count < OPERANDS_MAX) i->at[i->count++] = named(f, word);
    int may_be_guarded = i->code == LOAD || i->code == LOAD_2 || i->code == STORE || i->code == STORE_2 || i->code == BRA;
    return !word && (i->guard < 0 || (may_be_guarded && f->names[i->guard][0] != '!'));
}

static int read_function(struct CUfunc_st *f, char *text) {
    for (char *comment; (comment = strstr(text, "//"));) memset(comment, ' ', strcspn(comment, "\n"));
    char *entry = strstr(text, ".visible .entry "), *body = entry ? strchr(entry, '{') : NULL, *threads = entry ? strstr(entry, ".reqntid ") : NULL;
    if (strncmp(text + strspn(text, " \n"), ".version 7.0\n.target sm_80\n.address_size 64\n", 44) || !body || !threads) return 0;
    for (int at = 0; at < 4; at++) named(f, first_names[at]);
    *body++ = 0;
    char *end = strrchr(body, '}'), *rest;
    sscanf(entry, ".visible .entry %63[^( \n]", f->name);
    f->threads = atoi(threads + strlen(".reqntid "));
    for (char *at = entry; (at = strstr(at, ".param .")) && f->parameter_count < PARAMETERS_MAX;) {
        char type[8], name[40], *line = at + strlen(".param .");
        size_t length = strcspn(line, ",\n");
        char copy[128] = "";
        memcpy(copy, line, length < sizeof copy ? length : sizeof copy - 1);
        if (sscanf(copy, "%7s", type) != 1 || sscanf(strrchr(copy, ' '), " %39s", name) != 1) return 0;
        f->parameter_bytes[f->parameter_count] = strcmp(type, "u64") ? 4 : 8;
        f->parameters[f->parameter_count++] = named(f, name);
        at = line;
    }
    if (end) *end = 0;
    for (char *statement = strtok_r(body, ";", &rest); statement; statement = strtok_r(NULL, ";", &rest))
        if (!read_instruction(f, statement)) return 0;
    return f->instruction_count && f->instructions[f->instruction_count - 1].code == RET;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    CUcontext context;
    if (getenv("STUB_CUDA_PTX_REFUSED")) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    if (cuCtxGetCurrent(&context) || !context) return CUDA_ERROR_INVALID_CONTEXT;
    char *text = strdup(image);
    *module = calloc(1, sizeof **module);
    int right = read_function(&(*module)->function, text);
    free(text);
    return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_PTX;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = &module->function;
    return strcmp(name, module->function.name) ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

/* -- running ------------------------------------------------------------------------------------------------------- */

struct run { CUdevice device; struct { CUdeviceptr start; size_t size; } seen[4]; int next, lies; };  /* seen: ranges of memory */

static CUresult reach(struct run *run, uint64_t address, size_t size) {  /* is it memory of the device? */
    if (address % size) return CUDA_ERROR_MISALIGNED_ADDRESS;
    for (int at = 0; at < 4; at++)
        if (address - run->seen[at].start < run->seen[at].size && run->seen[at].size - (address - run->seen[at].start) >= size)
            return CUDA_SUCCESS;
    int owner, at = run->next++ % 4;
    if (cuMemGetAddressRange_v2(&run->seen[at].start, &run->seen[at].size, address)
        || cuPointerGetAttribute(&owner, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address) || owner != run->device)
        return run->seen[at].size = 0, CUDA_ERROR_ILLEGAL_ADDRESS;
    return run->seen[at].size - (address - run->seen[at].start) >= size ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

static CUresult move(struct run *run, struct instruction *i, uint64_t (*r)[LANES]) {  /* loads and stores of one word or two */
    int words = i->code == LOAD_2 || i->code == STORE_2 ? 2 : 1, is_load = i->code == LOAD || i->code == LOAD_2;
    int *values = i->at + (is_load ? 0 : 2), *place = i->at + (is_load ? words : 0);
    if (i->count != words + 2) return CUDA_ERROR_INVALID_PTX;
    for (int lane = 0; lane < LANES; lane++) {
        if (i->guard >= 0 && !r[i->guard][lane]) continue;
        uint64_t *memory = (uint64_t *)(r[place[0]][lane] + r[place[1]][lane]);
        CUresult result = reach(run, (uint64_t)memory, 8 * words);
        if (result) return result;
        for (int word = 0; word < words; word++)
            if (is_load) r[values[word]][lane] = memory[word];
            else memory[word] = r[values[word]][lane] ^ (run->lies && words == 1);
    }
    return CUDA_SUCCESS;
}

static CUresult run_warp(struct run *run, struct CUfunc_st *f, uint64_t (*r)[LANES]) {
    uint64_t before[LANES];
    for (int pc = 0;;) {
        struct instruction *i = &f->instructions[pc++];
        int *at = i->at, taken = 0;
        CUresult result = CUDA_SUCCESS;
        switch (i->code) {
#define OP(code, name, value) \
            case code: \
                for (int lane = 0; lane < LANES; lane++) { \
                    uint64_t a = r[at[1]][lane], b = r[at[2]][lane], c = r[at[3]][lane]; \
                    (void)b, (void)c; \
                    r[at[0]][lane] = value; \
                } \
                break;
            COMPUTED
#undef OP
            case MOV_B64:  /* to a register, or to the two halves of one */
                memcpy(before, r[at[i->count - 1]], sizeof before);
                for (int lane = 0; lane < LANES; lane++) {
                    r[at[0]][lane] = i->count == 3 ? U32(before[lane]) : before[lane];
                    if (i->count == 3) r[at[1]][lane] = before[lane] >> 32;
                }
                break;
            case LOAD: case LOAD_2: case STORE: case STORE_2: result = move(run, i, r); break;
            case SHFL_IDX: case SHFL_BFLY:
                if (r[at[3]][0] != 31 || U32(r[at[4]][0]) != ~0u) return CUDA_ERROR_INVALID_PTX;
                memcpy(before, r[at[1]], sizeof before);
                for (int lane = 0; lane < LANES; lane++)
                    r[at[0]][lane] = before[(i->code == SHFL_IDX ? r[at[2]][lane] : lane ^ r[at[2]][lane]) & 31];
                break;
            case BRA: case BRA_UNI:
                for (int lane = 0; lane < LANES; lane++) taken += i->guard < 0 || r[i->guard][lane];
                if ((taken && taken != LANES) || f->labels[at[0]] < 0) return CUDA_ERROR_NOT_SUPPORTED;
                if (taken) pc = f->labels[at[0]];
                break;
            case RET: return CUDA_SUCCESS;
            case CODES: return CUDA_ERROR_INVALID_PTX;
        }
        if (result) return result;
    }
}

static void start(struct CUfunc_st *f, uint64_t (*r)[LANES], void **values, unsigned x, unsigned y, unsigned first_thread) {
    memset(r, 0xee, f->name_count * sizeof *r);  /* nobody says that a register is zero */
    for (int lane = 0; lane < LANES; lane++) {
        for (int at = 0; at < f->name_count; at++)
            if (f->is_number[at]) r[at][lane] = f->numbers[at];
        for (int at = 0; at < f->parameter_count; at++)
            r[f->parameters[at]][lane] = f->parameter_bytes[at] == 8 ? *(uint64_t *)values[at] : *(uint32_t *)values[at];
        r[BLOCK_X][lane] = x, r[BLOCK_Y][lane] = y, r[THREAD][lane] = first_thread + lane;
    }
}

CUresult cuLaunchKernel(CUfunction f, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared_bytes, CUstream stream, void **values, void **extra) {
    struct run run = {.lies = getenv("STUB_CUDA_KERNELS_LIE") != NULL};
    if (cuCtxGetDevice(&run.device)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!grid_x || !grid_y || grid_y > 65535 || grid_z != 1 || (int)block_x != f->threads || block_y != 1 || block_z != 1 || stream || extra
        || shared_bytes) return CUDA_ERROR_INVALID_VALUE;
    uint64_t (*r)[LANES] = malloc(f->name_count * sizeof *r);
    CUresult result = r ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    for (unsigned y = 0; y < grid_y; y++)
        for (unsigned x = 0; x < grid_x; x++)
            for (unsigned thread = 0; thread < block_x && !result; thread += LANES) {
                start(f, r, values, x, y, thread);
                result = run_warp(&run, f, r);
            }
    free(r);
    return result;
}
