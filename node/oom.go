// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"strconv"
)

// SetOOMScore tells the kernel how readily it may kill this process when memory
// runs out, from -1000 (never) to 1000. A score below the last one that was set
// with CAP_SYS_RESOURCE needs that capability.
func SetOOMScore(score int32) *KernelProblem {
	p := set("/proc/self/oom_score_adj", strconv.Itoa(int(score)))
	if p != nil {
		p.Impact = "this process may be killed sooner than others when memory runs out"
		p.remedy = fmt.Sprintf("give the container CAP_SYS_RESOURCE, or set --oom-score-adj (oomScoreAdj in a file) to %s or more", p.Found)
	}
	return p
}
