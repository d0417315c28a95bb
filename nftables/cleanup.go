package nftables

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// kubeProxyTable is the table of kube-proxy's nftables mode.
const kubeProxyTable = "kube-proxy"

// Cleanup removes this mode's table of the family, and nothing else. It is no
// error if there is none, and then nothing is written and removed is false.
func Cleanup(f plan.Family) (removed bool, err error) { return removeTable(f, tableName) }

// CleanupKubeProxy removes the table of kube-proxy's nftables mode likewise.
func CleanupKubeProxy(f plan.Family) (removed bool, err error) {
	return removeTable(f, kubeProxyTable)
}

func removeTable(f plan.Family, name string) (removed bool, err error) {
	w, err := dial(nft.FamilyOf(f), name)
	if err != nil {
		return false, err
	}
	defer w.Close()
	removed = w.DeleteTable()
	err = access.Commit(w)
	if errors.Is(err, unix.EINVAL) { // of nfnetlink, which knows no nf_tables
		return false, unsupported(f, "nf_tables", "the kernel needs CONFIG_NF_TABLES (module nf_tables)", err)
	}
	if err != nil {
		return false, fmt.Errorf("delete table %s of %s: %w", name, f, err)
	}
	return removed, nil
}

// HasKubeProxy says whether there is a table of kube-proxy's nftables mode.
func HasKubeProxy(f plan.Family) bool {
	w, err := dial(nft.FamilyOf(f), kubeProxyTable)
	if err != nil {
		return false
	}
	defer w.Close()
	exists, err := w.Exists()
	return err == nil && exists
}
