package nftables

import (
	"errors"
	"fmt"
	"slices"

	nflib "github.com/google/nftables"
	"golang.org/x/sys/unix"

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

// HasChain says whether a table of other software has a chain.
func HasChain(f plan.Family, table, chain string) (bool, error) {
	w, err := dial(familyOf(f), table)
	if err != nil {
		return false, err
	}
	defer w.close()
	chains, err := w.conn.ListChainsOfTableFamily(w.family.table)
	if err != nil {
		return false, fmt.Errorf("list chains: %w", err)
	}
	return slices.ContainsFunc(chains, func(c *nflib.Chain) bool { return c.Table.Name == table && c.Name == chain }), nil
}

func removeTable(f plan.Family, name string) (removed bool, err error) {
	w, err := dial(familyOf(f), name)
	if err != nil {
		return false, err
	}
	defer w.close()
	removed = w.DeleteTable()
	err = w.flush()
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
	w, err := dial(familyOf(f), kubeProxyTable)
	if err != nil {
		return false
	}
	defer w.close()
	exists, err := w.exists()
	return err == nil && exists
}
