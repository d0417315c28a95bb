// SPDX-License-Identifier: Apache-2.0

//go:build guest

package compare

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestRandom compares kube-proxy and signalbox on a few random Services. The machine was
// given the programs.
func TestRandom(t *testing.T) {
	for _, mode := range []string{"ipvs", "nftables", "iptables-nft", "userspace"} {
		t.Run(mode, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Getenv("SIGNALBOX_VM_LAB"), "compare",
				"--mode", mode, "--random", "20", "--seed", "1", "--out", t.TempDir(),
				"--signalbox", os.Getenv("SIGNALBOX_VM_SIGNALBOX"), "--kubernetes", filepath.Dir(os.Getenv("SIGNALBOX_VM_ETCD")))
			cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
			if err := cmd.Run(); err != nil {
				t.Error(err)
			}
		})
	}
}
