package node

import "strconv"

const oomFile = "/proc/self/oom_score_adj"

// SetOOMScore tells the kernel how readily it may kill this process when memory
// runs out, from -1000 (never) to 1000. Only with CAP_SYS_RESOURCE can it be
// less than whoever had that capability last has set.
func SetOOMScore(score int32) *KernelProblem {
	p := set(oomFile, strconv.Itoa(int(score)))
	if p != nil {
		p.Without = "this process may be killed sooner than others when memory runs out"
	}
	return p
}
